// The third tab: its list of kept exports, and its pictures enlarged.

const VISITOR = 'ovam-visitor';

// A browser may forbid a page in another one's frame to keep anything.
function remembered() {
  try { return localStorage.getItem(VISITOR) || ''; } catch { return ''; }
}

function remember(visitor) {
  try { if (visitor) localStorage.setItem(VISITOR, visitor); } catch { /* then a reload begins anew */ }
}

function localTimes(root) {
  for (const time of root.querySelectorAll('time[data-at]')) {
    const at = new Date(1000 * Number(time.dataset.at));
    time.dateTime = at.toISOString();
    time.textContent = at.toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' });
  }
}

// Says who this is, hands on clicks on the list's buttons as events of its component, and writes times as they are here.
function exportList(element, trigger, watch) {
  const events = { resume: 'submit', open: 'select', remove: 'delete' };
  element.addEventListener('click', (event) => {
    const button = event.target.closest('button[data-act]');
    if (button) trigger(events[button.dataset.act], { export: button.dataset.export });
  });
  watch('value', () => {
    remember(element.querySelector('[data-visitor]')?.dataset.visitor);
    localTimes(element);
  });
  trigger('input', { visitor: remembered() });
}

// A picture and its label map as large as the window allows; the arrow keys go on to the next.
function exportPictures(element) {
  const dialog = document.createElement('dialog');
  dialog.className = 'export-look';
  dialog.setAttribute('aria-label', 'Image and label map');
  dialog.innerHTML = '<div class="both"></div><div class="about"></div><button type="button">Close</button>';
  element.append(dialog);
  const [both, about, close] = dialog.children;
  let place = 0;

  const figures = () => [...document.querySelectorAll('#exported figure')];
  const show = (number) => {
    const all = figures();
    if (!all.length) return;
    place = (number + all.length) % all.length;
    both.replaceChildren(...[...all[place].querySelectorAll('img')].map((image) => image.cloneNode()));
    about.replaceChildren(...[...all[place].querySelector('figcaption').children].map((part) => part.cloneNode(true)));
    if (!dialog.open) dialog.showModal();
  };

  document.addEventListener('click', (event) => {
    const figure = event.target.closest?.('#exported figure button')?.closest('figure');
    if (figure) show(figures().indexOf(figure));
  });
  dialog.addEventListener('click', (event) => { if (event.target === dialog || event.target === close) dialog.close(); });
  dialog.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(place + step);
  });
}
