// What the first tab does in the browser: hands answers to the viewer, keeps the address and the strip of pictures.
// `window.ovamView` is the viewer (viewer.js); Gradio's hidden fields and buttons are the way to the server.
(() => {
  const WAIT_FOR_TYPING = 450; // milliseconds after the last letter
  const MAX_HISTORY = 12, THUMB = 112, STORE = 'ovam-history';
  const TABS = ['generate', 'optimize', 'export'];
  const OWN = ['prompt', 'words', 'seed', 'negative', 'steps', 'guidance', 'guided', 'width', 'height', 'tau', 'alpha', 'crf',
    'method', 'beside', 'used', 'grids', 'sentence', 'half'];
  const $ = selector => document.querySelector(selector);
  const box = id => $(`#${id} textarea, #${id} input`);
  const view = () => window.ovamView;
  let shown = null; // the last answer with a picture
  let typing = 0, resting = 0, stopping = false, heard = false;
  const waits = new Set(); // for another picture: the answer to a 'start', the end of a 'run', one 'brought' back
  const busy = () => waits.size > 0;
  let later = false; // what is asked was changed while a picture was made
  let newPhoto = false; // one was uploaded that is not looked at yet
  let restoring = false; // the visitor went back or forward: the address is right already

  // ---- the way to the server

  function put(id, text) {
    const field = box(id);
    field.value = text;
    field.dispatchEvent(new Event('input', {bubbles: true}));
  }

  function ask(button, field, value) {
    if (field) put(field, JSON.stringify(value));
    // Gradio takes the value of a field over in its next turn.
    setTimeout(() => $(`#${button}`)?.click(), field ? 60 : 0);
  }

  function follow(link) {
    starting(link.prompt);
    ask('link-go', 'link-in', link);
  }

  // ---- what is said above the picture

  function say(text) {
    const line = $('#said');
    if (line) line.textContent = text || '';
  }

  function stale(reason) {
    view()?.stale(reason || null);
  }

  const doing = prompt => (onPhoto() ? 'Looking at the photograph' : `Making “${prompt || 'your picture'}”`);
  const onPhoto = () => !box('prompt');

  // At once, before the server has answered.
  function starting(prompt) {
    waits.add('start');
    say('');
    stale(`${doing(prompt)}: waiting for the model`);
  }

  function making({making, done, of}) {
    const begins = !waits.has('run') || !of;
    if (!of) [later, stopping, newPhoto] = [false, false, false];
    waits.delete('start');
    waits.add('run');
    say('');
    const step = of && done ? `step ${done} of ${of}` : 'waiting for the model';
    if (!stopping) stale(`${doing(making)}: ${step}`);
    if (begins && innerWidth < 1024) $('.buttons')?.scrollIntoView({behavior: 'smooth', block: 'start'}); // Stop, and below it the picture
  }

  function halting() {
    stopping = waits.has('run');
    if (stopping) stale('Stopping after this step …');
  }

  // A picture of before takes the place of one that is being made.
  function bring(key, link) {
    if (waits.has('run')) $('#stop').click();
    waits.add('brought');
    say('');
    stale('Bringing the picture back …');
    ask('recall-go', 'link-in', {key, link});
  }

  // What cannot be made leaves all else as it is, a run too.
  function denied(reason) {
    waits.delete('start');
    restoring = false;
    if (!busy()) stale(reason);
  }

  function stopped(reason) {
    waits.delete('run');
    if (busy()) return;
    restoring = false;
    say(`${reason} ${shown ? 'The picture is the one before.' : ''}`.trim());
    edited();
    catchUp();
  }

  // ---- answers

  function answer(payload) {
    heard = true;
    if ('making' in payload) return making(payload);
    if ('gone' in payload) return gone(payload.gone);
    if (payload.empty) return;
    const fresh = payload.picture && payload.picture.src;
    if (payload.denied) return denied(payload.denied);
    if (payload.stopped) return stopped(payload.stopped);
    if (busy() && !fresh) return void (later = true); // of the picture before
    if (!fresh && payload.columns && shown && payload.key !== shown.key) {
      later = true;
      return catchUp();
    }
    say('');
    if (!payload.columns) return unanswered(payload.refused);
    waits.clear();
    const before = shown;
    if (fresh || !shown) shown = payload;
    else shown = {...shown, ...payload, picture: shown.picture};
    view().show(payload);
    view().words?.(box('words').value);
    stale(payload.refused);
    if (!payload.refused) edited();
    address(Boolean(fresh && before));
    remember(Boolean(fresh));
    if (fresh) catchUp();
  }

  // Words and methods that were changed while a picture was made are asked for once it is there.
  function catchUp() {
    const words = shown?.words !== undefined && box('words').value.trim() !== shown.words.trim();
    if (!shown || !(words || later)) return;
    later = false;
    stale('Looking for the words …');
    $('#typed').click();
  }

  function gone(link) {
    if (link && link.prompt) return follow(link);
    waits.clear();
    restoring = false;
    edited();
    say('This photograph is not on the server any more; upload it again.');
  }

  // Not asked for again by itself: the same would come of it, for ever.
  function unanswered(reason = 'This got no answer: change it, or press Enter in the words to ask again.') {
    if (!shown) return;
    if (busy()) return void (later = true);
    stale(reason);
    view().unanswered();
  }

  function strip(payload) {
    if (payload.frames) return view().strip(payload);
    say(payload.said);
    view().noStrip();
  }

  // No picture comes.
  function failed() {
    waits.clear();
    restoring = false;
    edited();
    if (shown) catchUp();
    else ask('open-go'); // as if no address had been given
  }

  // ---- what is out of date

  function edited() {
    if (busy()) return;
    const link = shown?.link;
    const other = link?.prompt !== undefined && box('prompt') && box('prompt').value.trim() !== link.prompt.trim();
    if (other) stale('The prompt has changed: press Generate to draw it.');
    else stale(newPhoto && onPhoto() ? 'A new photograph is here: press “Find the words”.' : null);
  }

  function uploaded() {
    newPhoto = true;
    if (shown) edited();
  }

  function typed() {
    clearTimeout(typing);
    if (shown && !busy() && box('words').value.trim() !== (shown.words ?? '').trim()) stale('Looking for the words …');
    typing = setTimeout(() => {
      if (shown && !busy()) $('#typed').click();
    }, WAIT_FOR_TYPING);
  }

  // ---- words

  const listed = () => box('words').value.split(/[,;]/).map(one => one.trim()).filter(Boolean);

  function add(word) {
    const words = listed();
    if (!words.some(one => one.toLowerCase() === word.toLowerCase())) put('words', [...words, word].join(', '));
  }

  function remove({asked, kind}) {
    if (kind === 'token') {
      const tokens = [...document.querySelectorAll('#tokens .token')];
      const found = tokens.find(one => one.textContent.trim().startsWith(asked));
      return found?.querySelector('.token-remove, button, svg')?.dispatchEvent(new MouseEvent('click', {bubbles: true}));
    }
    put('words', listed().filter(one => one.toLowerCase() !== String(asked).toLowerCase()).join(', '));
  }

  // ---- the address: prompt, seed, words, threshold, method, tab

  function current() {
    const all = new URLSearchParams(location.search), own = {};
    for (const name of OWN) if (all.has(name)) own[name] = all.get(name);
    return own;
  }

  function write(link, push) {
    const all = new URLSearchParams(location.search);
    for (const name of OWN) all.delete(name);
    for (const [name, value] of Object.entries(link)) all.set(name, value);
    const search = all.toString() ? `?${all}` : location.pathname;
    if (search === location.search || (search === location.pathname && !location.search)) return;
    history[push ? 'pushState' : 'replaceState'](null, '', search);
  }

  // another: in place of another picture, so that the way back leads to it.
  function address(another) {
    const untouched = !Object.keys(current()).length && shown.key === 'first';
    if (!untouched) write(shown.link || {}, another && !restoring);
    restoring = false;
  }

  // From the server where it is kept, else made again.
  function restore() {
    select();
    const link = current(), plain = link.prompt === undefined; // the page as it opens
    const kept = stored().find(one => (plain ? one.key === 'first' : same(one, {key: '', link})));
    if (plain && !kept) return location.reload();
    const wanted = plain ? kept.link : link;
    if (!busy() && shown && sameLink(shown, wanted)) return;
    restoring = true;
    if (kept) bring(kept.key, wanted);
    else follow(wanted);
  }

  const sameLink = ({link = {}}, other) => OWN.every(name => link[name] === other[name]);

  function moved(name, value) {
    if (shown?.link?.prompt === undefined) return;
    shown.link[name] = String(value);
    if (shown.key !== 'first' || Object.keys(current()).length) write(shown.link, false);
    remember(false);
  }

  function tabs() {
    return [...document.querySelectorAll('.tab-container [role=tab]')];
  }

  function select() {
    const wanted = TABS.indexOf(new URLSearchParams(location.search).get('tab') || TABS[0]);
    const tab = tabs()[Math.max(0, wanted)];
    if (tab && tab.getAttribute('aria-selected') !== 'true') tab.click();
  }

  function chosen(tab) {
    const name = TABS[tabs().indexOf(tab)], all = new URLSearchParams(location.search);
    if (!name || (all.get('tab') || TABS[0]) === name) return;
    if (name === TABS[0]) all.delete('tab'); else all.set('tab', name);
    history.replaceState(null, '', all.toString() ? `?${all}` : location.pathname);
  }

  // ---- the pictures of before

  function stored() {
    try {
      return JSON.parse(sessionStorage.getItem(STORE)) || [];
    } catch {
      return [];
    }
  }

  function store(entries) {
    try {
      sessionStorage.setItem(STORE, JSON.stringify(entries));
    } catch { /* no room: the strip is of this page alone */ }
    strips(entries);
  }

  async function thumb(src) {
    const picture = new Image();
    picture.src = src;
    await picture.decode();
    const scale = THUMB / Math.max(picture.width, picture.height), canvas = document.createElement('canvas');
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    canvas.getContext('2d').drawImage(picture, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL('image/webp', 0.8);
  }

  const same = (one, other) => {
    const made = ({words, tau, alpha, crf, method, beside, used, grids, sentence, half, ...rest}) => JSON.stringify(rest);
    return one.key === other.key || (one.link.prompt && made(one.link) === made(other.link));
  };

  async function remember(fresh) {
    const {key, link, prompt, picture} = shown;
    const entries = stored(), entry = {key, link: link || {}, title: prompt || 'photograph'};
    const at = entries.findIndex(one => same(one, entry));
    if (at >= 0) {
      entries[at] = {...entries[at], ...entry};
    } else if (fresh) {
      entry.thumb = await thumb(picture.src);
      entries.unshift(entry);
    }
    store(entries.slice(0, MAX_HISTORY));
  }

  function strips(entries) {
    const place = $('#history');
    if (!place) return;
    place.replaceChildren(...(entries.length > 1 ? entries.map(button) : []));
  }

  function button(entry) {
    const made = document.createElement('button'), picture = document.createElement('img');
    made.type = 'button';
    const words = entry.link.words ? `: ${entry.link.words}` : '';
    made.title = `${entry.title}${words}`;
    made.setAttribute('aria-label', `Back to “${entry.title}”${words}`);
    if (shown && same(entry, {key: shown.key, link: shown.link || {}})) made.setAttribute('aria-current', 'true');
    picture.src = entry.thumb;
    picture.alt = '';
    made.append(picture);
    made.addEventListener('click', () => bring(entry.key, entry.link));
    return made;
  }

  // ---- what is heard

  function slid(event) {
    const slider = event.target.closest('#tau, #alpha');
    const value = Number(event.target.value);
    if (!slider || !Number.isFinite(value) || event.target.value === '') return;
    view()?.[slider.id](value);
    clearTimeout(resting);
    resting = setTimeout(() => moved(slider.id, value), 300);
  }

  function clicked(event) {
    const example = event.target.closest('#examples [data-link]');
    if (example) return follow(JSON.parse(example.dataset.link));
    if (event.target.closest('#generate')) return starting(box('prompt')?.value.trim());
    if (event.target.closest('#stop')) return halting();
    const word = event.target.closest('#vocabulary button');
    if (word) return add(word.textContent);
    const tab = event.target.closest('.tab-container [role=tab]');
    if (tab) setTimeout(() => chosen(tab));
  }

  function listen() {
    document.addEventListener('input', event => {
      slid(event);
      if (event.target.closest('#prompt')) edited();
      if (busy() && event.target.closest('#sentence, #used')) later = true;
    });
    document.addEventListener('change', event => {
      if (event.target.closest('#crf')) view()?.crf(event.target.checked);
      if (event.target.closest('#source') && newPhoto) setTimeout(edited, 300);
      if (!event.target.closest('#method, #beside, #grids, #half, #crf')) return;
      if (busy()) later = true;
      else if (shown && !event.target.closest('#crf')) stale('Asking anew …');
    });
    document.addEventListener('keydown', event => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing && event.target.closest('#prompt')) starting(event.target.value.trim());
    }, true);
    document.addEventListener('click', clicked);
    document.addEventListener('ovam-add', event => add(event.detail.word));
    document.addEventListener('ovam-remove', event => remove(event.detail));
    document.addEventListener('ovam-mask', () => $('#typed').click());
    document.addEventListener('ovam-candidates', () => $('#candidates-go').click());
    document.addEventListener('ovam-lost', event => {
      if (shown) bring(event.detail.key, shown.link);
    });
    document.addEventListener('ovam-strip', event => ask('strip-go', 'strip-of', event.detail));
    document.addEventListener('ovam-film', event => ask('film-go', 'strip-of', event.detail));
    addEventListener('popstate', restore);
  }

  // A page that was just put together may not hear yet: asked again until there is an answer.
  function begin(tries = 4) {
    if (!$('#open-go') || !box('link-in') || !view()) return setTimeout(() => begin(tries), 100);
    const link = current();
    if (link.prompt) follow(link); else ask('open-go');
    setTimeout(() => {
      if (!heard && tries > 1) begin(tries - 1);
    }, 4000);
  }

  const picture = () => shown?.picture.src ?? '';
  window.ovamPage = {
    answer, candidates: payload => view().candidates(payload), strip, typed, uploaded, failed, unanswered, picture,
  };
  listen();
  strips(stored());
  setTimeout(select, 300);
  begin();
})();
