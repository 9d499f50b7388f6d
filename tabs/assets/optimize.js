// The second tab: a canvas to paint on, a search to watch, results to compare. Plain JS, no other host is asked.
// The server sends mails, {kind: ..., ...}; the page hands back what is painted, and where it was clicked.

function ovamLearn(root, ways) {
  const box = root.querySelector('.paint');
  const part = (name) => box.querySelector(`[data-part="${name}"]`);
  const at = (id) => document.getElementById(id);
  const canvas = part('canvas');
  const ctx = canvas.getContext('2d', {willReadFrequently: true});
  const colors = {object: box.dataset.object, background: box.dataset.background};
  const table = Uint8Array.from(atob(box.dataset.turbo), (letter) => letter.charCodeAt(0));
  const MAX_TRIED = 8;
  // ops: what was painted, in order, each redrawn to undo the last. version: of the paint, by which a result is stale.
  const state = {
    picture: null, image: null, tool: 'object', way: ways.paint, ops: [], version: 0, pending: 0, stroke: null,
    pointers: 0, cross: null, spot: '', handed: 0, run: null, result: null, tried: [], shown: -1,
  };

  // ---- small things

  const percent = (share) => `${(100 * share).toFixed(share && share < 0.01 ? 1 : 0)}%`;

  function element(kind, properties = {}, children = []) {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...children);
    return made;
  }

  function loaded(src) {
    return new Promise((done, failed) => {
      const image = new Image();
      image.onload = () => done(image);
      image.onerror = failed;
      image.src = src;
    });
  }

  function blank(width, height) {
    return element('canvas', {width, height});
  }

  function note(place, sentence) {
    const line = document.querySelector(`[data-note="${place}"]`);
    if (!line) return;
    line.innerHTML = sentence;  // escaped by the server
    if (sentence) line.scrollIntoView({block: 'nearest', behavior: 'smooth'});
  }

  function quiet() {
    document.querySelectorAll('.p-note').forEach((line) => { line.textContent = ''; });
  }

  function say(sentence) {
    part('said').textContent = sentence;
  }

  function setField(id, text) {
    const field = document.querySelector(`#${id} textarea, #${id} input`);
    if (!field) return;
    field.value = text;
    field.dispatchEvent(new Event('input', {bubbles: true}));
  }

  const field = (id) => document.querySelector(`#${id} textarea, #${id} input`)?.value.trim() ?? '';

  // ---- painting

  const width = () => Math.max(1, Number(part('size').value) / 100 * Math.max(canvas.width, canvas.height));

  function line(op, from = 0) {
    ctx.globalCompositeOperation = op.tool === 'eraser' ? 'destination-out' : 'source-over';
    ctx.strokeStyle = ctx.fillStyle = colors[op.tool] ?? '#000';
    ctx.lineWidth = op.width;
    ctx.lineCap = ctx.lineJoin = 'round';
    const [first, ...others] = op.points.slice(Math.max(0, from - 1));
    ctx.beginPath();
    const still = op.points.every(([x, y]) => x === op.points[0][0] && y === op.points[0][1]);
    if (still) {  // a line of no length draws nothing
      ctx.arc(...first, op.width / 2, 0, 2 * Math.PI);
      ctx.fill();
    } else {
      ctx.moveTo(...first);
      others.forEach((point) => ctx.lineTo(...point));
      ctx.stroke();
    }
  }

  function draw(op) {
    if (op.replaces) ctx.clearRect(0, 0, canvas.width, canvas.height);
    if (op.points) line(op);
    if (op.layer) {
      ctx.globalCompositeOperation = 'source-over';
      ctx.drawImage(op.layer, 0, 0);
    }
  }

  function redraw() {
    ctx.clearRect(0, 0, canvas.width, canvas.height);
    state.ops.slice(Math.max(0, state.ops.findLastIndex((op) => op.replaces))).forEach(draw);
    changed();
  }

  function add(op) {
    state.ops.push(op);
    if (!op.points) draw(op);
    changed();
  }

  // Shares of the picture that are painted in each colour.
  function shares() {
    const pixels = ctx.getImageData(0, 0, canvas.width, canvas.height).data;
    const counts = {object: 0, background: 0};
    for (let place = 0; place < pixels.length; place += 4) {
      if (pixels[place + 3] > 127) counts[pixels[place] > pixels[place + 1] ? 'object' : 'background'] += 1;
    }
    const all = canvas.width * canvas.height;
    return {object: counts.object / all, background: counts.background / all};
  }

  function changed() {
    state.version += 1;
    const {object, background} = shares();
    const other = background ? `, background ${percent(background)}` : '';
    const painted = object || background ? `painted: object ${percent(object)}${other} of the picture` : hint();
    say(painted[0].toUpperCase() + painted.slice(1) + '.');
    box.querySelector('[data-do="undo"]').disabled = !state.ops.length;
    box.querySelector('[data-do="clear"]').disabled = !(object || background);
    const alt = state.picture ? `${state.picture.alt}. ${painted}. Arrow keys move the brush, space paints.` : '';
    canvas.setAttribute('aria-label', alt || 'No picture yet');
    stale();
  }

  function hint() {
    if (!state.picture) return 'make a picture first';
    if (state.way === ways.strokes) {
      return 'a few magenta strokes on the object, cyan ones on the background; what stays bare counts for nothing';
    }
    return 'paint over the whole object; what stays bare is background';
  }

  // The tools that answer a click, and the button that asks the server.
  const CLICKED = {click: 'learn-clicked', sam: 'learn-clicked-sam'};

  // ---- the pointer: mouse, pen and one finger paint, two fingers move the page

  function place(event) {
    const frame = canvas.getBoundingClientRect();
    return [
      (event.clientX - frame.left) / frame.width * canvas.width,
      (event.clientY - frame.top) / frame.height * canvas.height,
    ];
  }

  function ring(point) {
    const mark = part('ring');
    mark.hidden = !point || !state.picture;
    if (mark.hidden) return;
    const scale = canvas.getBoundingClientRect().width / canvas.width;
    const side = CLICKED[state.tool] ? 14 : Math.max(6, width() * scale);
    mark.style.width = mark.style.height = `${side}px`;
    mark.style.left = `${point[0] * scale}px`;
    mark.style.top = `${point[1] * scale}px`;
    mark.dataset.tool = state.tool;
  }

  function click([x, y]) {
    const share = (value, of) => Math.min(1, Math.max(0, value / of)).toFixed(5);
    state.spot = `${share(x, canvas.width)},${share(y, canvas.height)}`;
    busy('Looking for what is here', true);
    at(CLICKED[state.tool])?.click();
  }

  function press(event) {
    if (!state.picture || event.button > 0) return;
    state.pointers += 1;
    if (state.pointers > 1) return abandon();  // a second finger: this is no stroke
    event.preventDefault();
    canvas.focus({preventScroll: true});
    quiet();
    canvas.setPointerCapture(event.pointerId);  // wherever it is let go, `lift` hears of it
    if (CLICKED[state.tool]) return click(place(event));
    state.stroke = {tool: state.tool, width: width(), points: [place(event)]};
    line(state.stroke);
  }

  function move(event) {
    if (event.pointerType !== 'touch') ring(place(event));
    if (!state.stroke) return;
    const from = state.stroke.points.length;
    const all = event.getCoalescedEvents?.() ?? [];
    (all.length ? all : [event]).forEach((one) => state.stroke.points.push(place(one)));
    line(state.stroke, from);
  }

  function lift() {
    state.pointers = Math.max(0, state.pointers - 1);
    const stroke = state.stroke;
    state.stroke = null;
    if (!stroke) return;
    state.ops.push(stroke);
    redraw();  // in one go, as undo draws it: parts that overlap have other edges
  }

  function abandon() {
    if (!state.stroke) return;
    state.stroke = null;
    redraw();
  }

  function key(event) {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === 'z') {
      event.preventDefault();
      return undo();
    }
    const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (!state.picture || !(event.key in steps || event.key === ' ' || event.key === 'Enter')) return;
    event.preventDefault();
    state.cross ??= [canvas.width / 2, canvas.height / 2];
    if (event.key in steps) {
      const by = (event.shiftKey ? 0.08 : 0.02) * Math.max(canvas.width, canvas.height);
      const [x, y] = steps[event.key];
      state.cross = [
        Math.min(canvas.width, Math.max(0, state.cross[0] + by * x)),
        Math.min(canvas.height, Math.max(0, state.cross[1] + by * y)),
      ];
    } else if (CLICKED[state.tool]) {
      click(state.cross);
    } else {
      const dab = {tool: state.tool, width: width(), points: [state.cross]};
      line(dab);
      add(dab);
    }
    ring(state.cross);
  }

  function undo() {
    if (state.ops.pop()) redraw();
  }

  function choose(tool) {
    state.tool = tool;
    box.querySelectorAll('[data-tool]').forEach((button) => {
      button.setAttribute('aria-pressed', String(button.dataset.tool === tool));
    });
  }

  const DOES = {
    undo,
    clear: () => add({replaces: true}),
    halt: () => at('learn-halt-picture')?.click(),
  };

  // ---- what the server sends to the canvas

  // `only`: the picture stays as it is, and only the mask is waited for.
  function busy(sentence, only = false, share = null) {
    quiet();
    const sign = part('busy'), bar = part('busy-share');
    sign.hidden = false;
    part('busy-said').textContent = `${sentence} …`;
    box.querySelector('[data-do="halt"]').hidden = only;
    if (share === null) bar.removeAttribute('value'); else bar.value = share;
    box.classList.toggle('coming', !only);
  }

  function idle() {
    part('busy').hidden = true;
    box.classList.remove('coming');
  }

  async function show(mail) {
    const turn = state.pending += 1;
    const image = await loaded(mail.src);
    if (turn !== state.pending) return;
    idle();
    Object.assign(state, {picture: mail, image, ops: [], cross: null});
    canvas.width = mail.width;
    canvas.height = mail.height;
    part('stage').style.aspectRatio = `${mail.width} / ${mail.height}`;
    part('image').src = mail.src;
    at('learn-facts').innerHTML = mail.facts;
    box.classList.remove('empty');
    things(mail.things);
    changed();
  }

  // What the picture shows, a button each: a click makes it the class.
  function things(names) {
    const line = at('learn-things');
    if (!line) return;
    const buttons = names.map((name) => element('button', {type: 'button', textContent: name}));
    line.replaceChildren(...(names.length ? ['In the picture: ', ...buttons] : []));
  }

  async function layer(mail) {
    const made = blank(canvas.width, canvas.height), c = made.getContext('2d');
    const all = c.createImageData(made.width, made.height);
    for (const name of ['background', 'object']) {
      if (!mail[name]) continue;
      const mask = blank(made.width, made.height), m = mask.getContext('2d');
      m.imageSmoothingEnabled = false;
      m.drawImage(await loaded(mail[name]), 0, 0, made.width, made.height);
      const marked = m.getImageData(0, 0, made.width, made.height).data;
      const rgb = [1, 3, 5].map((start) => parseInt(colors[name].slice(start, start + 2), 16));
      for (let at = 0; at < marked.length; at += 4) if (marked[at] > 127) all.data.set([...rgb, 255], at);
    }
    c.putImageData(all, 0, 0);
    return made;
  }

  // Of a picture that is not here any more, nothing.
  async function paint(mail) {
    const made = await layer(mail);
    if (mail.key !== state.picture?.key) return;
    if (!box.classList.contains('coming')) idle();  // else another picture is waited for
    if (mail.way) state.way = mail.way;
    if (mail.name && !field('class-name')) setField('class-name', mail.name);
    add({layer: made, replaces: !mail.add});
    say(mail.said);
  }

  function fromServer(mail) {
    if (mail.kind === 'picture') show(mail);
    if (mail.kind === 'paint') paint(mail);
    if (mail.kind === 'working') busy(mail.said, false, mail.share);
    if (mail.kind === 'note') {
      if (mail.said) idle();
      note(mail.place, mail.said);
    }
  }

  // ---- a search

  function handOver() {
    quiet();
    state.handed = state.version;
    if (!state.run) at('learn-said').textContent = 'Looking at the mask …';
    const {object, background} = state.picture ? shares() : {};
    return object || background ? canvas.toDataURL('image/png') : '';
  }

  function begin(mail) {
    state.run = {...mail, version: state.handed, image: state.image};
    at('curve').replaceChildren(element('p', {textContent: 'The first epoch is under way.'}));
    at('learn-said').textContent = 'Waiting for the model …';
    at('learn-live').scrollIntoView({block: 'nearest', behavior: 'smooth'});
    stale();
  }

  function frame(mail) {
    const {losses, of} = mail;
    if (losses.length) curve(losses, of);
    const best = Math.min(...losses);
    at('learn-said').textContent = `Epoch ${losses.length} of ${of} · loss ${losses.at(-1).toFixed(4)} · lowest ${best.toFixed(4)}`;
    if (!mail.map) return;
    const now = at('now');
    heat(now, state.run?.image ?? state.image, mail.map, 1, 360);
    now.parentElement.classList.add('full');
    now.setAttribute('aria-label', `Heatmap of ${state.run?.name ?? 'the class'} after epoch ${losses.length}`);
  }

  // The losses on an axis of all epochs, the lowest marked.
  function curve(losses, of) {
    const frame = at('curve'), w = frame.clientWidth || 280, h = frame.clientHeight || 232;
    const [left, right, top, bottom] = [44, 10, 14, 26];
    const low = Math.min(...losses), high = Math.max(...losses), spread = high - low || Math.abs(high) || 1;
    const x = (epoch) => left + (w - left - right) * epoch / Math.max(of - 1, 1);
    const y = (loss) => top + (h - top - bottom) * (high - loss) / spread;
    const points = losses.map((loss, epoch) => `${x(epoch).toFixed(1)},${y(loss).toFixed(1)}`);
    const best = losses.indexOf(low), base = h - bottom;
    frame.innerHTML = `<svg viewBox="0 0 ${w} ${h}" role="img" font-size="12" fill="currentColor"
aria-label="Loss over ${losses.length} of ${of} epochs: from ${losses[0].toFixed(4)}, lowest ${low.toFixed(4)}">
<path d="M${left} ${top}V${base}H${w - right}" fill="none" stroke="currentColor" stroke-opacity=".35"/>
<text x="${left - 6}" y="${top + 4}" text-anchor="end">${high.toFixed(3)}</text>
<text x="${left - 6}" y="${base}" text-anchor="end">${low.toFixed(3)}</text>
<text x="${left}" y="${h - 8}">1</text><text x="${w - right}" y="${h - 8}" text-anchor="end">${of}</text>
<text x="${(left + w - right) / 2}" y="${h - 8}" text-anchor="middle">epoch</text>
<polyline points="${points.join(' ')}" fill="none" stroke="var(--primary-500)" stroke-width="2" stroke-linejoin="round"/>
<circle cx="${x(best).toFixed(1)}" cy="${y(low).toFixed(1)}" r="4" fill="var(--primary-500)"/></svg>`;
  }

  // ---- maps and masks over a picture, as the files of this program have them

  function sized(target, image, most) {
    const scale = Math.min(1, most / Math.max(image.naturalWidth, image.naturalHeight));
    target.width = Math.round(image.naturalWidth * scale);
    target.height = Math.round(image.naturalHeight * scale);
    const c = target.getContext('2d', {willReadFrequently: true});
    c.drawImage(image, 0, 0, target.width, target.height);
    return c;
  }

  // top: the value at the top of the colours.
  function heat(target, image, map, top, most = 1024) {
    const c = sized(target, image, most);
    const small = blank(map.w, map.h), s = small.getContext('2d'), raw = s.createImageData(map.w, map.h);
    const values = atob(map.data);
    for (let n = 0; n < values.length; n += 1) raw.data.fill(values.charCodeAt(n), 4 * n, 4 * n + 3).fill(255, 4 * n + 3, 4 * n + 4);
    s.putImageData(raw, 0, 0);
    const large = blank(target.width, target.height).getContext('2d', {willReadFrequently: true});
    large.imageSmoothingQuality = 'high';
    large.drawImage(small, 0, 0, target.width, target.height);
    const heats = large.getImageData(0, 0, target.width, target.height).data;
    const shown = c.getImageData(0, 0, target.width, target.height), pixels = shown.data;
    const gain = top > 0 ? map.top / top : 0;
    for (let p = 0; p < pixels.length; p += 4) {
      // A grey, darker picture below: its own colours would be read as values of the map.
      const grey = 0.45 * (0.299 * pixels[p] + 0.587 * pixels[p + 1] + 0.114 * pixels[p + 2]);
      const row = 3 * Math.min(255, Math.round(heats[p] * gain));
      for (let k = 0; k < 3; k += 1) pixels[p + k] = 0.35 * grey + 0.65 * table[row + k];
    }
    c.putImageData(shown, 0, 0);
  }

  async function masked(target, image, url) {
    const c = sized(target, image, 1024);
    const mask = blank(target.width, target.height).getContext('2d', {willReadFrequently: true});
    mask.imageSmoothingEnabled = false;
    mask.drawImage(await loaded(url), 0, 0, target.width, target.height);
    const marked = mask.getImageData(0, 0, target.width, target.height).data;
    const rgb = [1, 3, 5].map((start) => parseInt(colors.object.slice(start, start + 2), 16));
    const shown = c.getImageData(0, 0, target.width, target.height), pixels = shown.data;
    for (let p = 0; p < pixels.length; p += 4) {
      for (let k = 0; k < 3; k += 1) {
        pixels[p + k] = marked[p] > 127 ? 0.45 * pixels[p + k] + 0.55 * rgb[k] : 0.6 * pixels[p + k];
      }
    }
    c.putImageData(shown, 0, 0);
  }

  function save(href, name) {
    const link = element('a', {href, download: name});
    document.body.append(link);
    link.click();
    link.remove();
  }

  // ---- two pictures, one over the other, with a divider that mouse, finger and arrow keys move

  function comparison(title, sides, alts, saves) {
    const divider = element('input', {type: 'range', min: 0, max: 100, step: 1, value: 50});
    divider.setAttribute('aria-label', `${title}: the word is left of the divider, its token right of it`);
    sides.forEach((side, number) => { side.setAttribute('role', 'img'); side.setAttribute('aria-label', alts[number]); });
    const marks = ['word', 'token'].map((text) => element('span', {className: 'c-mark', textContent: text}));
    const pair = element('div', {className: 'c-pair'}, [...sides, ...marks, element('i', {className: 'c-line'}), divider]);
    const set = () => pair.style.setProperty('--at', `${divider.value}%`);
    divider.addEventListener('input', set);
    set();
    const buttons = saves.map(([text, does]) => {
      const button = element('button', {type: 'button', textContent: text});
      button.addEventListener('click', does);
      return button;
    });
    const caption = element('figcaption', {textContent: title});
    return element('figure', {className: 'c-compare'}, [
      caption, pair, element('div', {className: 'c-saves'}, ['Save PNG: ', ...buttons]),
    ]);
  }

  // found: a mail with maps and masks of a word and its token, and the picture that they are of.
  async function comparisons(found, image) {
    const heats = [blank(1, 1), blank(1, 1)], masks = [blank(1, 1), blank(1, 1)];
    found.maps.forEach((map, n) => heat(heats[n], image, map, found.top));
    await Promise.all(found.masks.map((url, n) => masked(masks[n], image, url)));
    const kinds = ['word', 'token'];
    const named = (n, what) => `${found.stem}-${kinds[n]}-${what}.png`;
    const heatSaves = kinds.map((kind, n) => [kind, () => save(heats[n].toDataURL('image/png'), named(n, 'heatmap'))]);
    const maskSaves = kinds.map((kind, n) => [kind, () => save(found.masks[n], named(n, 'mask'))]);
    return [
      comparison(
        'Heatmap', heats, kinds.map((kind, n) => `Heatmap of the ${kind} ${found.name}, peak ${found.peaks[n].toFixed(2)}`),
        heatSaves,
      ),
      comparison(
        'Mask', masks, kinds.map((kind, n) => `Mask of the ${kind} ${found.name}, ${percent(found.shares[n])} of the picture`),
        maskSaves,
      ),
    ];
  }

  async function result(mail) {
    const run = state.run ?? {version: state.version, image: state.image};
    const made = await comparisons(mail, run.image);
    state.result = {...mail, version: run.version};
    state.run = null;
    const panel = at('learn-result');
    panel.hidden = false;
    at('verdict').innerHTML = mail.verdict;  // escaped by the server
    panel.querySelector('[data-part="comparisons"]').replaceChildren(...made);
    suggest(mail.name);
    stale();
  }

  // Another prompt to try, as long as the person has written none.
  function suggest(name) {
    const text = `A photograph of ${/^[aeiou]/i.test(name) ? 'an' : 'a'} ${name} on grass`;
    if ([undefined, '', state.suggested].includes(field('try-prompt'))) setField('try-prompt', state.suggested = text);
    const empty = document.querySelector('.t-empty');
    if (empty) empty.textContent = 'Press Go: the same token on a picture that it has never seen.';
  }

  // A result beside a picture or a mask that it does not belong to is dimmed and says so.
  function stale() {
    const panel = at('learn-result');
    if (!panel || !state.result) return;
    let why = '';
    if (state.run) why = 'A new token is being learned; this is the one before.';
    else if (state.result.key !== state.picture?.key) why = 'This token was learned from another picture than the one above.';
    else if (state.result.version !== state.version) why = 'The mask has changed since this token was learned.';
    [panel, at('verdict')].forEach((part) => part.classList.toggle('stale', Boolean(why)));
    document.querySelectorAll('.l-stale').forEach((line) => { line.textContent = why; });
  }

  function fromSearch(mail) {
    if (mail.kind === 'begun') begin(mail);
    if (mail.kind === 'making') at('learn-said').textContent = `${mail.said} …`;
    if (mail.kind === 'frame') frame(mail);
    if (mail.kind === 'result') result(mail);
    if (mail.kind === 'refused') notBegun();
    if (mail.kind === 'note') ended();
    if (mail.place) note(mail.place, mail.said);
  }

  // One that is under way goes on.
  function notBegun() {
    if (!state.run) at('learn-said').textContent = '';
  }

  function ended() {
    state.run = null;
    at('learn-said').textContent = '';
    stale();
  }

  // ---- the token on other pictures: the last few stay, in a strip

  function trying() {
    quiet();
    at('tried-said').textContent = 'Waiting for the model …';
  }

  async function tried(mail) {
    const image = await loaded(mail.src);
    state.tried = [...state.tried, {...mail, image}].slice(-MAX_TRIED);
    at('tried-said').textContent = '';
    await look(state.tried.length - 1);
  }

  async function look(number) {
    const one = state.tried[number];
    state.shown = number;
    const thumbs = state.tried.map((other, n) => {
      const text = `${other.name}: ${other.prompt}, seed ${other.seed}`;
      const button = element('button', {type: 'button', title: text}, [element('img', {src: other.src, alt: text})]);
      button.setAttribute('aria-pressed', String(n === number));
      button.addEventListener('click', () => look(n));
      return button;
    });
    at('tried-strip').replaceChildren(...thumbs);
    const made = await comparisons(one, one.image);
    if (state.shown !== number) return;
    const picture = element('figure', {className: 'c-compare'}, [
      element('figcaption', {textContent: 'Picture'}), element('img', {src: one.src, alt: one.prompt}),
    ]);
    const agree = one.agree === null ? '' : ` · the two masks overlap by ${percent(one.agree)} (IoU)`;
    const caption = element('p', {className: 't-caption'});
    caption.append(element('b', {textContent: `“${one.prompt}”`}), ` · token of ${one.name}`, element('br'));
    const facts = element('span', {innerHTML: one.facts});
    const covers = `the word covers ${percent(one.shares[0])}, its token ${percent(one.shares[1])} of the picture${agree}`;
    caption.append(facts, element('br'), covers);
    at('tried-shown').replaceChildren(element('div', {className: 'l-comparisons three'}, [picture, ...made]), caption);
  }

  function fromElsewhere(mail) {
    if (mail.kind === 'working') at('tried-said').textContent = `${mail.said} …`;
    if (mail.kind === 'tried') tried(mail);
    if (mail.kind === 'note') {
      notTried();
      note(mail.place, mail.said);
    }
  }

  function notTried() {
    at('tried-said').textContent = '';
  }

  // What waits for each kind of call is told where that fails; why is said by Gradio.
  const FAILED = {canvas: idle, begin: notBegun, learn: ended, try: notTried};

  // ---- ears

  canvas.addEventListener('pointerdown', press);
  canvas.addEventListener('pointermove', move);
  canvas.addEventListener('pointerup', lift);
  canvas.addEventListener('pointercancel', () => { state.pointers = 0; abandon(); });
  canvas.addEventListener('pointerleave', () => ring(null));
  canvas.addEventListener('blur', () => ring(null));
  canvas.addEventListener('keydown', key);
  box.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (button?.dataset.tool) choose(button.dataset.tool);
    if (button?.dataset.do) DOES[button.dataset.do]();
  });
  document.addEventListener('click', (event) => {
    const thing = event.target.closest?.('#learn-things button');
    if (thing) setField('class-name', thing.textContent);
  });

  return {
    canvas: fromServer,
    live: fromSearch,
    tried: fromElsewhere,
    busy,
    trying,
    handOver,
    failed: (call) => FAILED[call](),
    spot: () => state.spot,
    way: (name) => { state.way = name; changed(); },
  };
}
