// The large picture of the first tab: layers, words, pointing, all drawn here from maps that are sent once.
// ovamViewer(root) takes the element of tabs/viewer.py's skeleton and returns the methods that the page calls.
const ovamViewer = (() => {
  'use strict';

  const LARGEST = 512;        // side at which one map is drawn; the canvas enlarges it smoothly
  const BUDGET = 700_000;     // pixels of all masks of a frame together: ten words stay smooth
  const RAW_AFTER = 300;      // ms without movement, then the server's masks are wanted
  const DIM = 0.45;           // brightness of the grey picture under a heatmap, as plot.overlay has it
  const LISTED = 6;           // words in the list at a point
  const KEPT = 24;            // pictures that are remembered by their key
  const AROUND = 405;         // px of a page that stand above the picture and below it, down to the sliders
  const FRAME_TIME = 260;     // ms of a frame that plays
  const NONE = {method: '', about: '', live: true, crf: false, hasAlpha: false, words: [], attention: {}};

  // ------------------------------------------------------------------------------------------------ maps

  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

  function decode(grid) {
    const fine = grid.fine ? bytes(grid.fine) : null, step = grid.top / 255;
    const values = Float32Array.from(bytes(grid.data), (byte, i) => (byte + (fine ? fine[i] / 255 - 0.5 : 0)) * step);
    return {w: grid.w, h: grid.h, top: grid.top, values};
  }

  // Where each of `to` samples lies between two of `from`: bilinear, corners not aligned, as PyTorch does it.
  function axis(from, to) {
    const low = new Int32Array(to), high = new Int32Array(to), part = new Float32Array(to);
    for (let i = 0; i < to; i++) {
      const at = Math.max(0, (i + 0.5) * from / to - 0.5);
      low[i] = Math.min(from - 1, Math.floor(at));
      high[i] = Math.min(from - 1, low[i] + 1);
      part[i] = at - low[i];
    }
    return {low, high, part};
  }

  function resize(map, w, h) {
    if (map.w === w && map.h === h) return map;
    const xs = axis(map.w, w), ys = axis(map.h, h);
    const rows = new Float32Array(map.h * w), values = new Float32Array(h * w);
    for (let y = 0; y < map.h; y++) {
      const from = y * map.w, to = y * w;
      for (let x = 0; x < w; x++) {
        const left = map.values[from + xs.low[x]];
        rows[to + x] = left + (map.values[from + xs.high[x]] - left) * xs.part[x];
      }
    }
    for (let y = 0; y < h; y++) {
      const above = ys.low[y] * w, below = ys.high[y] * w, part = ys.part[y], to = y * w;
      for (let x = 0; x < w; x++) {
        const upper = rows[above + x];
        values[to + x] = upper + (rows[below + x] - upper) * part;
      }
    }
    return {w, h, top: map.top, values};
  }

  // The value that `resize` to the picture's size has at one of its pixels.
  function sample(map, x, y, width, height) {
    const across = Math.max(0, (x + 0.5) * map.w / width - 0.5), down = Math.max(0, (y + 0.5) * map.h / height - 0.5);
    const x0 = Math.min(map.w - 1, Math.floor(across)), x1 = Math.min(map.w - 1, x0 + 1);
    const y0 = Math.min(map.h - 1, Math.floor(down)), y1 = Math.min(map.h - 1, y0 + 1);
    const row = (at, part) => map.values[at * map.w + x0] * (1 - part) + map.values[at * map.w + x1] * part;
    return row(y0, across - x0) * (1 - down + y0) + row(y1, across - x0) * (down - y0);
  }

  function peakOf(map) {
    let peak = 0;
    for (const value of map.values) if (value > peak) peak = value;
    return peak;
  }

  // A_alpha * D (Eq. 8) on the grid of the attention.
  function weigh(map, attention, alpha) {
    if (!attention || alpha >= 1) return map;
    const {w, h} = attention, own = resize(map, w, h), values = new Float32Array(w * h);
    for (let i = 0; i < values.length; i++) values[i] = own.values[i] * (alpha + (1 - alpha) * attention.values[i]);
    return {w, h, values};
  }

  // A mask as a map that is cut at a half, its steps of single pixels rounded where it will be enlarged.
  function soften(mask) {
    const {w, h} = mask, source = mask.data, values = new Float32Array(w * h);
    if (Math.max(w, h) > 256) return {w, h, values: values.map((_, i) => source[i])};
    const at = (x, y) => source[Math.min(h - 1, Math.max(0, y)) * w + Math.min(w - 1, Math.max(0, x))];
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        let sum = 4 * at(x, y) + 2 * (at(x - 1, y) + at(x + 1, y) + at(x, y - 1) + at(x, y + 1));
        sum += at(x - 1, y - 1) + at(x + 1, y - 1) + at(x - 1, y + 1) + at(x + 1, y + 1);
        values[y * w + x] = sum / 16;
      }
    }
    return {w, h, values};
  }

  // Which edges (upper, right, lower, left) of a cell of four samples the outline joins, by the samples inside (bits: 1 upper left, clockwise).
  const JOINS = [[], [3, 0], [0, 1], [3, 1], [1, 2], [3, 0, 1, 2], [0, 2], [3, 2], [2, 3], [2, 0], [0, 1, 2, 3],
    [2, 1], [1, 3], [1, 0], [0, 3], []];

  // The line at which a map passes a level, in the map's own pixels.
  function contour({w, h, values}, level) {
    const path = new Path2D();
    for (let y = 0; y < h - 1; y++) {
      for (let x = 0; x < w - 1; x++) {
        const i = y * w + x, a = values[i], b = values[i + 1], c = values[i + w + 1], d = values[i + w];
        const kind = (a >= level) | (b >= level) << 1 | (c >= level) << 2 | (d >= level) << 3;
        if (kind === 0 || kind === 15) continue;
        const joins = JOINS[kind], between = (from, to) => 0.5 + (level - from) / (to - from);
        const cross = [[x + between(a, b), y + 0.5], [x + 1.5, y + between(b, c)], [x + between(d, c), y + 1.5],
          [x + 0.5, y + between(a, d)]];
        for (let j = 0; j < joins.length; j += 2) {
          path.moveTo(...cross[joins[j]]);
          path.lineTo(...cross[joins[j + 1]]);
        }
      }
    }
    return path;
  }

  // The row of the strongest of the fields that hold a pixel, by its map beside its own peak; -1 for none.
  function winnersOf(fields, w, h) {
    const winners = new Int16Array(w * h).fill(-1), best = new Float32Array(w * h).fill(-1);
    fields.forEach(({values, level, plain, peak}, row) => {
      for (let i = 0; i < winners.length; i++) {
        if (values[i] < level) continue;
        const share = peak > 0 ? plain[i] / peak : 0;
        if (share > best[i]) [best[i], winners[i]] = [share, row];
      }
    });
    return winners;
  }

  // --------------------------------------------------------------------------------------------- pictures

  function canvasOf(w, h) {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [w, h];
    return canvas;
  }

  // A canvas of pixels, each a number 0xAABBGGRR that `color` gives of its place.
  function painted(w, h, color) {
    const canvas = canvasOf(w, h), context = canvas.getContext('2d'), image = context.createImageData(w, h);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = color(i);
    context.putImageData(image, 0, 0);
    return canvas;
  }

  const packed = (r, g, b, a = 255) => (a << 24 | b << 16 | g << 8 | r) >>> 0;
  const ofHex = hex => packed(...[1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)));

  async function loaded(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }

  function pixelsOf(image, w, h) {
    const context = canvasOf(w, h).getContext('2d', {willReadFrequently: true});
    context.drawImage(image, 0, 0, w, h);
    return context.getImageData(0, 0, w, h).data;
  }

  function greyed(image, w, h) {
    const data = pixelsOf(image, w, h);
    return painted(w, h, i => {
      const grey = DIM * Math.round(0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]);
      return packed(grey, grey, grey);
    });
  }

  async function maskOf(url, w, h) {
    const data = pixelsOf(await loaded(url), w, h);
    return {w, h, data: Uint8Array.from({length: w * h}, (_, i) => data[4 * i] > 127 ? 1 : 0)};
  }

  const CRC = Uint32Array.from({length: 256}, (_, n) => {
    for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xEDB88320 ^ n >>> 1 : n >>> 1;
    return n;
  });

  function chunk(name, data) {
    const whole = new Uint8Array(data.length + 12), view = new DataView(whole.buffer);
    view.setUint32(0, data.length);
    whole.set([...name].map(letter => letter.charCodeAt(0)), 4);
    whole.set(data, 8);
    const sum = whole.subarray(4, -4).reduce((crc, byte) => CRC[(crc ^ byte) & 255] ^ crc >>> 8, 0xFFFFFFFF);
    view.setUint32(data.length + 8, ~sum >>> 0);
    return whole;
  }

  // A PNG of one byte a pixel, which a canvas cannot write: grey, or with a palette of 256 colours.
  async function png(w, h, data, palette = null) {
    const rows = new Uint8Array(h * (w + 1));
    for (let y = 0; y < h; y++) rows.set(data.subarray(y * w, y * w + w), y * (w + 1) + 1);
    const squeezed = new Blob([rows]).stream().pipeThrough(new CompressionStream('deflate'));
    const head = new Uint8Array(13), view = new DataView(head.buffer);
    view.setUint32(0, w);
    view.setUint32(4, h);
    head.set([8, palette ? 3 : 0], 8);
    const parts = [chunk('IHDR', head), ...(palette ? [chunk('PLTE', palette)] : [])];
    parts.push(chunk('IDAT', new Uint8Array(await new Response(squeezed).arrayBuffer())), chunk('IEND', new Uint8Array(0)));
    return new Blob([Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), ...parts], {type: 'image/png'});
  }

  const asPng = canvas => new Promise(done => canvas.toBlob(done, 'image/png'));

  function download(blob, name) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  // ------------------------------------------------------------------------------------------------- texts

  const plain = word => word.normalize('NFKC').trim().toLowerCase();
  const slug = word => word.normalize('NFKC').replace(/[^\p{L}\p{M}\p{N}]+/gu, '-').replace(/^-|-$/g, '') || 'word';
  const figure = value => value >= 0.095 || value === 0 ? value.toFixed(2) : value.toPrecision(1);
  const quoted = word => `“${word}”`;

  function element(tag, attributes = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (tag === 'button') made.type = 'button';
    made.append(...inside);
    return made;
  }

  // ------------------------------------------------------------------------------------------------ mount

  return function ovamViewer(root) {
    const part = name => root.querySelector(`[data-part="${name}"]`);
    const canvas = part('canvas'), context = canvas.getContext('2d');
    const turbo = (() => {
      const data = bytes(root.dataset.turbo);
      return Uint32Array.from({length: 256}, (_, i) => packed(data[3 * i], data[3 * i + 1], data[3 * i + 2]));
    })();
    const gradient = `linear-gradient(to right, ${Array.from({length: 12}, (_, i) => {
      const color = turbo[Math.round(i * 255 / 11)];
      return `rgb(${color & 255} ${color >> 8 & 255} ${color >> 16 & 255})`;
    }).join()})`;

    let answer = null;        // as it came, with decoded maps
    let columns = [];
    let chosen = 0;           // the column of the large picture
    let picture = null;       // {image, grey, w, h}
    let groups = {key: null, words: []};  // of words that are not asked
    let strip = null;
    let layer = 'masks', oneScale = false, focus = null, hover = null, point = null, typed = null;
    let tau = null, alpha = null, crf = null, waiting = false, timer = 0, wanted = '';
    let turn = 0, staleTurn = 0, frame = 0, playing = 0, spoken = 0;
    const touched = new Set(); // of tau, alpha and crf: what was moved while the picture was out of date
    const opacity = {heatmap: 0.65, masks: 0.3, winner: 0.6};
    const hidden = new Set(), adding = new Set(), pictures = new Map();

    const emit = (name, detail = {}) => root.dispatchEvent(new CustomEvent(name, {detail, bubbles: true}));
    const column = () => columns[chosen] ?? NONE;
    const words = () => column().words;
    const visible = (of = column()) => of.words.filter(word => !hidden.has(word.label));
    const focused = (of = column()) => of.words.find(word => word.label === focus) ?? null;
    const asked = word => words().some(one => plain(one.label) === plain(word));

    // ---- masks

    const nowTau = () => tau ?? answer.asked.tau;
    const nowAlpha = () => alpha ?? answer.asked.alpha;
    const nowCrf = () => crf ?? answer.asked.crf;
    const sameCut = () => nowTau() === answer.asked.tau && nowAlpha() === answer.asked.alpha;

    // Tokens keep to their own until a slider is moved away from the model's usual setting.
    function cutOf(word, of) {
      const own = (name, now) => word[name] != null && now === answer.preset[name] ? word[name] : now;
      return {tau: own('tau', nowTau()), alpha: of.hasAlpha ? own('alpha', nowAlpha()) : 1};
    }

    // The server's mask, where it is what is wanted now; the rest is a threshold.
    function serverMask(word, of) {
      if (!of.live) return word.mask;
      return of.crf && nowCrf() && answer.asked.crf && sameCut() ? word.mask : null;
    }

    function serverWanted() {
      const refined = nowCrf() && !(answer.asked.crf && sameCut()), recut = nowTau() !== answer.asked.tau;
      return columns.some(one => one.words.length > 0 && (one.live ? one.crf && refined : recut));
    }

    function kept(word, name, key, make) {
      const cache = word.cache ??= {};
      if (cache[name]?.key !== key) cache[name] = {key, value: make()};
      return cache[name].value;
    }

    function lattice(count, largest = LARGEST) {
      const side = Math.min(largest, Math.round(Math.sqrt(BUDGET / Math.max(1, count))));
      const scale = side / Math.max(picture.w, picture.h);
      return [Math.max(1, Math.round(picture.w * scale)), Math.max(1, Math.round(picture.h * scale))];
    }

    // Peaks are those at the picture's size, of at most LARGEST, so that the cut is the server's.
    function basis() {
      const scale = Math.min(1, LARGEST / Math.max(picture.w, picture.h));
      return [Math.round(picture.w * scale), Math.round(picture.h * scale)];
    }

    const weighted = (word, of) => {
      const now = cutOf(word, of).alpha;
      return kept(word, 'weighted', now, () => {
        const map = weigh(word.map, of.attention[word.branch], now);
        return {map, peak: peakOf(resize(map, ...basis()))};
      });
    };
    const scaleTop = word => word.peak ??= peakOf(resize(word.map, ...basis()));

    // What is cut to make a word's mask at w x h: {values, level}, and the plain map by which words are compared.
    function fieldOf(word, of, w, h) {
      const given = serverMask(word, of), cut = cutOf(word, of);
      const key = `${w} ${h} ${given ? 'given' : cut.alpha}`;
      const values = kept(word, 'values', key, () => resize(given ? soften(given) : weighted(word, of).map, w, h).values);
      const level = given ? 0.5 : weighted(word, of).peak > 0 ? cut.tau * weighted(word, of).peak : Infinity;
      const plainMap = kept(word, 'plain', `${w} ${h}`, () => resize(word.map, w, h).values);
      return {w, h, values, level, plain: plainMap, peak: scaleTop(word), key: `${key} ${level}`};
    }

    const outline = (word, field) => kept(word, 'outline', field.key, () => contour(field, field.level));

    // The true mask, uint8 at any size: what is saved, and what the server would have made.
    function maskAt(word, of, w, h) {
      const given = serverMask(word, of);
      if (given && given.w === w && given.h === h) return given.data;
      const map = resize(weighted(word, of).map, w, h), peak = peakOf(map), level = cutOf(word, of).tau * peak;
      return Uint8Array.from(map.values, value => peak > 0 && value >= level ? 1 : 0);
    }

    function labelsAt(of, w, h) {
      const fields = of.words.map(word => {
        const map = resize(word.map, w, h);
        return {values: maskAt(word, of, w, h), level: 1, plain: map.values, peak: peakOf(map)};
      });
      return Uint8Array.from(winnersOf(fields, w, h), row => row + 1);
    }

    // ---- painting, on any context of W x H

    function heatOf(map, top, w, h) {
      return kept(map, `heat ${w}`, top, () => {
        const {values} = resize(map, w, h), scale = top > 0 ? 256 / top : 0;
        return painted(w, h, i => turbo[Math.min(255, values[i] * scale | 0)]);
      });
    }

    function paintHeat(on, W, H, map, top, share, size) {
      on.drawImage(picture.grey, 0, 0, W, H);
      on.globalAlpha = share;
      on.drawImage(heatOf(map, top, ...size), 0, 0, W, H);
      on.globalAlpha = 1;
    }

    function strokes(on, W, size, paths, width) {
      on.save();
      on.scale(W / size[0], W / size[0]);
      [on.lineCap, on.lineJoin] = ['round', 'round'];
      for (const [path, color, share] of paths) {
        for (const [style, wide] of [['rgb(0 0 0 / 0.55)', width * 2.1], [color, width]]) {
          [on.strokeStyle, on.lineWidth, on.globalAlpha] = [style, wide * size[0] / W, share];
          on.stroke(path);
        }
      }
      on.restore();
    }

    function paintMasks(on, W, H, of, {spot = null, share, width, winner = false}) {
      const shown = visible(of), size = lattice(shown.length), fields = shown.map(word => fieldOf(word, of, ...size));
      on.drawImage(picture.image, 0, 0, W, H);
      if (spot) {
        const {values, level} = fieldOf(spot, of, ...size), dark = packed(0, 0, 0, 150);
        on.drawImage(painted(...size, i => values[i] >= level ? 0 : dark), 0, 0, W, H);
      } else if (shown.length) {
        const colors = shown.map(word => ofHex(word.color)), key = fields.map(field => field.key).join();
        const none = winner ? packed(12, 16, 26) : 0;
        const fill = kept(of, winner ? 'winner' : 'fill', `${shown.map(word => word.label)} ${key}`, () => {
          const winners = winnersOf(fields, ...size);
          return painted(...size, i => winners[i] < 0 ? none : colors[winners[i]]);
        });
        on.globalAlpha = share;
        on.drawImage(fill, 0, 0, W, H);
        on.globalAlpha = 1;
      }
      if (winner && !spot) return;
      const paths = shown.filter(word => !spot || word !== spot).map(word => [word, spot ? 0.3 : 1]);
      if (spot) paths.push([spot, 1]);
      const drawn = paths.map(([word, alone]) => [outline(word, fieldOf(word, of, ...size)), word.color, alone]);
      strokes(on, W, size, drawn, width);
    }

    function paintPoint(on, W, H) {
      if (!point || !(point.kept || point.keys)) return;
      const x = (point.x + 0.5) * W / picture.w, y = (point.y + 0.5) * H / picture.h, r = 6 * ratio();
      const path = new Path2D();
      path.arc(x, y, r, 0, 2 * Math.PI);
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        path.moveTo(x + dx * r, y + dy * r);
        path.lineTo(x + dx * r * 2.2, y + dy * r * 2.2);
      }
      for (const [style, width] of [['rgb(0 0 0 / 0.7)', 4], ['#fff', 2]]) {
        [on.strokeStyle, on.lineWidth] = [style, width * ratio()];
        on.stroke(path);
      }
    }

    const ratio = () => Math.min(2, window.devicePixelRatio || 1);
    const largestTop = () => Math.max(...columns.flatMap(one => one.words.map(scaleTop)), 0);
    const topOf = word => oneScale ? Math.max(largestTop(), hover?.candidate ? scaleTop(word) : 0) : scaleTop(word);

    // What the large picture shows now: a word's map, a moment of the strip, or masks.
    function view() {
      if (strip && strip.at >= 0) {
        const now = strip.frames[strip.at];
        return {map: now.map, top: strip.top, label: strip.label, moment: now.label};
      }
      const pointed = hover?.candidate ?? words().find(word => word.label === hover?.label);
      const heat = layer === 'heatmap' || hover?.candidate || (layer === 'picture' && pointed);
      const word = pointed ?? focused() ?? words()[0];
      if (heat && word) return {map: word.map, top: topOf(word), label: word.label, peak: scaleTop(word)};
      return {layer: layer === 'heatmap' ? 'picture' : layer, spot: hover?.label ? pointed : null};
    }

    function draw() {
      frame = 0;
      if (!picture || !answer || !canvas.width) return;
      const W = canvas.width, H = canvas.height, now = view();
      [context.imageSmoothingEnabled, context.imageSmoothingQuality] = [true, 'high'];
      context.clearRect(0, 0, W, H);
      if (now.map) paintHeat(context, W, H, now.map, now.top, opacity.heatmap, lattice(1));
      else if (now.layer === 'picture') context.drawImage(picture.image, 0, 0, W, H);
      else {
        const winner = now.layer === 'winner';
        const how = {spot: now.spot, share: opacity[now.layer], width: 2.25 * ratio(), winner};
        paintMasks(context, W, H, column(), how);
      }
      paintPoint(context, W, H);
      drawColumns();
      say(now);
    }

    function schedule() {
      if (!frame) frame = requestAnimationFrame(draw);
    }

    function drawColumns() {
      if (columns.length < 2) return;
      columns.forEach((one, number) => {
        const small = one.canvas, on = small.getContext('2d'), W = small.width, H = small.height;
        const word = one.words.find(each => each.label === (hover?.label ?? focus));
        one.figure.setAttribute('aria-pressed', number === chosen);
        setText(one.peakLine, one.said ?? (layer === 'heatmap' && word ? `peak ${figure(scaleTop(word))}` : ''));
        one.figure.classList.toggle('lacks', layer === 'heatmap' && !word && !one.said);
        on.imageSmoothingQuality = 'high';
        if (layer === 'heatmap' && word) {
          paintHeat(on, W, H, word.map, oneScale ? largestTop() : scaleTop(word), opacity.heatmap, lattice(4, 256));
        } else if (one.words.length && (layer === 'masks' || layer === 'winner')) {
          paintMasks(on, W, H, one, {share: opacity[layer], width: 1.6 * ratio(), winner: layer === 'winner'});
        } else on.drawImage(layer === 'picture' ? picture.image : picture.grey, 0, 0, W, H);
      });
    }

    // ---- words about the picture

    const legend = (() => {
      const bar = element('i', {style: `background: ${gradient}`}), top = element('b'), name = element('span');
      const scale = element('span', {class: 'v-scale'}, element('b', {}, '0'), bar, top);
      const text = element('span', {class: 'v-note'});
      const one = element('button', {class: 'v-toggle', 'aria-pressed': 'false'}, 'One scale for all words');
      one.addEventListener('click', () => {
        oneScale = !oneScale;
        one.setAttribute('aria-pressed', oneScale);
        schedule();
      });
      part('legend').append(name, scale, text, one);
      return {name, scale, top, text, one};
    })();

    function setText(node, text) {
      if (node.textContent !== text) node.textContent = text;
    }

    function noteOf(now) {
      if (!words().length) return 'No word is asked for yet.';
      if (now.layer === 'winner') return 'One word a pixel: of those whose mask holds it, the map that is largest beside its own peak.';
      if (now.layer === 'picture') return '';
      if (now.spot) return `The mask of ${quoted(now.spot.label)}.`;
      const sharp = column().live ? column().crf && nowCrf() && !waiting : true;
      const overlap = visible().length > 1 ? ' Where masks overlap, the fill is the stronger word’s.' : '';
      return (column().live ? `Each map, cut at its threshold${sharp ? ' and sharpened' : ''}.` : 'Masks of this method.') + overlap;
    }

    function say(now) {
      const heat = Boolean(now.map), several = heat && columns.length > 1 && !oneScale && !now.moment;
      setText(legend.name, heat ? quoted(now.label) + (now.moment ? ` · ${now.moment}` : '') : '');
      setText(legend.top, several ? 'peak' : figure(now.top ?? 0));
      setText(legend.text, heat ? (several ? 'each map to its own peak' : '') : noteOf(now));
      legend.scale.hidden = !heat;
      legend.one.hidden = !heat || Boolean(now.moment) || words().length + columns.length < 3;
      const shown = now.map ? `Heatmap of ${quoted(now.label)}${now.moment ? `, ${now.moment}` : ''}` : now.spot
        ? `Mask of ${quoted(now.spot.label)}` : {masks: 'Masks', winner: 'One winner a pixel', picture: 'The picture'}[now.layer];
      const listed = now.map || now.layer === 'picture' ? '' : ` of ${visible().map(word => quoted(word.label)).join(', ') || 'no word'}`;
      const peak = now.peak === undefined ? '' : `, peak ${figure(now.peak)}`;
      canvas.setAttribute('aria-label', `${shown}${now.spot ? '' : listed}${peak}, on ${quoted(answer.picture.alt)}. `
        + 'Arrow keys point at a pixel, Enter keeps it, Escape lets go.');
      setText(part('busy'), waiting ? (nowCrf() && column().crf ? 'sharpening…' : 'cutting anew…') : '');
      part('busy').classList.toggle('on', waiting);
      const field = part('opacity-field'), kind = now.map ? 'heatmap' : now.layer;
      field.classList.toggle('off', kind === 'picture');
      if (kind !== 'picture' && document.activeElement !== part('opacity')) part('opacity').value = opacity[kind];
    }

    function renderCaption() {
      const {prompt, facts} = answer, line = part('caption'), method = element('span', {title: column().about}, column().method);
      line.replaceChildren(element('strong', {}, prompt ? quoted(prompt) : 'No caption'));
      if (facts) line.append(` · ${facts}`);
      if (method.textContent) line.append(' · ', method);
    }

    // ---- chips

    // What the pointer or the keyboard is on, by the element's `what`: {label} of a word, {candidate} of one not asked.
    function setHover(what) {
      if (hover === what) return;
      hover = what;
      schedule();
    }
    for (const list of [part('chips'), part('card')]) {
      const of = event => event.target.closest('.v-chip, .v-claim')?.what ?? null;
      list.addEventListener('pointerover', event => event.pointerType !== 'touch' && setHover(of(event)));
      list.addEventListener('pointerleave', () => setHover(null));
      list.addEventListener('focusin', event => event.target.matches(':focus-visible') && setHover(of(event)));
      list.addEventListener('focusout', () => setHover(null));
    }

    function choose(label) {
      focus = label;
      pause();
      if (strip) strip.at = -1;
      if (strip && strip.label !== label) askStrip(strip.over);
      renderChips();
      renderStrip();
    }

    const isAbsent = word => answer?.preset.unlikely != null && word.presence != null && word.presence < answer.preset.unlikely;

    // A mask is cut at a share of its map's own peak, so a word for nothing has one too.
    function presenceHint(word) {
      if (word.presence == null) return 'Show its map';
      if (!isAbsent(word)) return `Show its map · presence ${figure(word.presence)} of 1`;
      return `Probably not in the picture: presence ${figure(word.presence)} of 1. Its map shows where it would be.`;
    }

    function wordChip(word) {
      const shown = !hidden.has(word.label), dot = element('i', {style: `--c: ${word.color}`});
      const eye = element('button', {class: 'v-dot', 'data-at': `eye ${word.label}`, 'aria-pressed': shown,
        'aria-label': `${word.label}: in the masks`, title: shown ? 'Hide its mask' : 'Show its mask'}, dot);
      const name = element('button', {class: 'v-word', 'data-at': `word ${word.label}`, 'aria-pressed': word.label === focus,
        title: presenceHint(word)}, word.label, ' ', element('small', {title: 'peak of its map'}, figure(scaleTop(word))));
      const chip = element('span', {class: 'v-chip', style: `--c: ${word.color}`}, eye, name);
      const gone = word.kind === 'word' && word.asked && typed && !typed.has(plain(word.asked));
      chip.classList.toggle('off', !shown);
      chip.classList.toggle('absent', isAbsent(word));
      if (isAbsent(word)) chip.append(element('em', {title: presenceHint(word)}, 'probably not there'));
      chip.classList.toggle('on', word.label === focus);
      chip.classList.toggle('gone', Boolean(gone));
      eye.addEventListener('click', () => {
        if (!hidden.delete(word.label)) hidden.add(word.label);
        renderChips();
      });
      name.addEventListener('click', () => choose(word.label));
      chip.what = {label: word.label};
      if (word.asked != null) {
        const drop = element('button', {class: 'v-x', 'data-at': `x ${word.label}`, 'aria-label': `Remove ${word.label}`, title: 'Remove'}, '×');
        drop.addEventListener('click', () => {
          chip.classList.add('gone');
          emit('ovam-remove', {asked: word.asked, kind: word.kind});
        });
        chip.append(drop);
      }
      return chip;
    }

    const pending = word => adding.has(plain(word)) || Boolean(typed?.has(plain(word)));

    function add(word) {
      adding.add(plain(word));
      emit('ovam-add', {word});
      renderChips();
    }

    function offerChip(candidate) {
      const waits = pending(candidate.label);
      const chip = element('button', {class: 'v-chip v-offer', 'data-at': `offer ${candidate.label}`,
        'aria-label': `Add ${candidate.label}`, title: 'Point: its map. Click: ask for it.'},
        element('span', {'aria-hidden': 'true'}, waits ? '…' : '+'), ` ${candidate.label}`);
      chip.classList.toggle('waits', waits);
      chip.addEventListener('click', () => add(candidate.label));
      chip.what = {candidate};
      return chip;
    }

    function renderChips() {
      const list = part('chips'), at = document.activeElement?.dataset?.at, within = list.contains(document.activeElement);
      const offers = offered('prompt');
      hover = null;
      list.replaceChildren(...words().map(wordChip));
      if (offers.length) list.append(element('span', {class: 'v-also'}, 'also in the prompt:'), ...offers.map(offerChip));
      if (within) list.querySelector(`[data-at="${CSS.escape(at)}"]`)?.focus();
      const name = focused()?.label;
      setText(part('over-title'), name ? `When ${quoted(name)} appeared` : '');
      part('over').hidden = !name;
      renderCard();
      schedule();
    }

    // Candidates that are not asked, each word once.
    function offered(group = null) {
      if (!answer || groups.key !== answer.key || groups.parts !== answer.parts) return [];
      const seen = new Set(words().map(word => plain(word.label)));
      return groups.words.filter(one => {
        const name = plain(one.label);
        if (seen.has(name)) return false;
        seen.add(name);
        return group === null || one.group === group;
      });
    }

    // ---- pointing

    // Who claims a pixel, strongest first: the values themselves rank, as `claims` of ovam_core does it.
    function rank(x, y) {
      const of = column(), {w, h} = picture;
      const value = word => sample(word.map, x, y, w, h);
      const inside = word => {
        const given = serverMask(word, of);
        if (given) return given.data[y * w + x] === 1;
        const {map, peak} = weighted(word, of);
        return peak > 0 && sample(map, x, y, w, h) >= cutOf(word, of).tau * peak;
      };
      const own = words().map(word => ({label: word.label, group: 'asked', color: word.color, value: value(word), inMask: inside(word)}));
      const others = of.live ? offered().map(word => ({label: word.label, group: word.group, color: null, value: value(word),
        inMask: inside(word), word})) : [];
      return [...own, ...others].sort((a, b) => b.value - a.value);
    }

    function renderCard() {
      const card = part('card'), within = card.contains(document.activeElement) && document.activeElement.dataset.at;
      const jumps = root.classList.contains('narrow') && !point?.kept && !point?.keys;
      card.hidden = !point || !picture || !answer || jumps;
      if (card.hidden) return;
      const all = rank(point.x, point.y), top = all[0]?.value || 1;
      const listed = all.filter((one, place) => place < LISTED || one.group === 'asked');
      card.classList.toggle('kept', Boolean(point.kept));
      card.replaceChildren(element('header', {}, 'Who claims this point'), ...listed.map(one => claimRow(one, top)));
      if (!all.length) card.append(element('p', {}, 'No word is asked for yet.'));
      if (point.kept) {
        const close = element('button', {class: 'v-x', 'data-at': 'close', 'aria-label': 'Let the point go'}, '×');
        close.addEventListener('click', () => { letGo(); canvas.focus(); });
        card.firstChild.append(close);
      } else card.append(element('footer', {}, point.keys ? 'Enter keeps it' : 'Click to keep it'));
      if (within) (card.querySelector(`[data-at="${CSS.escape(within)}"]`) ?? canvas).focus();
      placeCard(card);
    }

    function claimRow(one, top) {
      const mark = one.inMask ? 'in its mask' : 'outside of its mask';
      const row = element('div', {class: `v-claim ${one.group}`, style: one.color ? `--c: ${one.color}` : ''},
        element('i', {class: one.inMask ? 'in' : '', title: mark, role: 'img', 'aria-label': mark}),
        element('span', {}, one.label),
        element('u', {}, element('s', {style: `width: ${Math.max(1, 100 * one.value / top)}%`})),
        element('b', {}, one.value.toFixed(2)));
      row.what = one.group === 'asked' ? {label: one.label} : {candidate: one.word};
      if (point.kept && one.group !== 'asked') {
        const plus = element('button', {'data-at': `add ${one.label}`, 'aria-label': `Add ${one.label}`, title: 'Ask for it'},
          pending(one.label) ? '…' : '+');
        plus.addEventListener('click', () => add(one.label));
        row.append(plus);
      }
      return row;
    }

    // Beside the point, on the side where there is room; below the picture where it is narrow.
    function placeCard(card) {
      if (root.classList.contains('narrow')) return void card.removeAttribute('style');
      const wide = canvas.clientWidth, high = canvas.clientHeight, gap = 20;
      const x = (point.x + 0.5) / picture.w * wide, y = (point.y + 0.5) / picture.h * high;
      const left = x + gap + card.offsetWidth <= wide + spare() || x < card.offsetWidth + gap ? x + gap : x - gap - card.offsetWidth;
      const most = Math.max(-spare() + 4, wide + spare() - card.offsetWidth - 4);
      card.style.left = `${Math.min(left, most)}px`;
      card.style.top = `${Math.max(4, Math.min(y - card.offsetHeight / 2, high - card.offsetHeight - 4))}px`;
    }
    const spare = () => Math.max(0, (part('stage').clientWidth - canvas.clientWidth) / 2);

    function setPoint(next) {
      point = next;
      renderCard();
      schedule();
    }
    const letGo = () => setPoint(null);

    function pixelAt(event) {
      const box = canvas.getBoundingClientRect();
      const within = (share, most) => Math.max(0, Math.min(most - 1, Math.floor(share * most)));
      return {x: within((event.clientX - box.left) / box.width, picture.w), y: within((event.clientY - box.top) / box.height, picture.h)};
    }

    function speak() {
      clearTimeout(spoken);
      spoken = setTimeout(() => {
        if (!point) return;
        const top = rank(point.x, point.y).slice(0, 3).map(one => `${one.label} ${one.value.toFixed(2)}`);
        setText(part('spoken'), `${point.kept ? 'Kept: ' : ''}pixel ${point.x}, ${point.y}: ${top.join(', ')}`);
      }, 250);
    }

    canvas.addEventListener('pointermove', event => {
      if (!picture || point?.kept || event.pointerType === 'touch') return;
      setPoint(pixelAt(event));
    });
    canvas.addEventListener('pointerleave', () => { if (point && !point.kept && !point.keys) letGo(); });
    canvas.addEventListener('click', event => {
      if (!picture) return;
      const at = pixelAt(event), close = point?.kept && Math.hypot(at.x - point.x, at.y - point.y) < picture.w / 40;
      setPoint(close ? null : {...at, kept: true});
      speak();
    });
    canvas.addEventListener('blur', () => { if (point?.keys && !point.kept) letGo(); });
    canvas.addEventListener('keydown', event => {
      const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
      if (!picture || !(way || event.key === 'Enter')) return;
      event.preventDefault();
      const from = point ?? {x: picture.w >> 1, y: picture.h >> 1};
      const step = Math.max(1, Math.round(Math.max(picture.w, picture.h) / 64)) * (event.shiftKey ? 4 : 1);
      const move = (at, by, most) => Math.max(0, Math.min(most - 1, at + by * step));
      if (way) setPoint({x: move(from.x, way[0], picture.w), y: move(from.y, way[1], picture.h), keys: true});
      else setPoint({...from, kept: true});
      speak();
    });
    root.addEventListener('keydown', event => {
      if (event.key !== 'Escape') return;
      if (part('menu').open) {
        part('menu').open = false;
        part('menu').firstElementChild.focus();
      } else if (point) {
        const inside = part('card').contains(document.activeElement);
        letGo();
        if (inside) canvas.focus();
      } else if (hover) {
        hover = null;
        schedule();
      }
    });

    // ---- layers and saving

    function setLayer(name) {
      layer = name;
      pause();
      if (strip) strip.at = -1;
      for (const button of root.querySelectorAll('[data-layer]')) button.setAttribute('aria-pressed', button.dataset.layer === name);
      renderStrip();
      schedule();
    }
    for (const button of root.querySelectorAll('[data-layer]')) button.addEventListener('click', () => setLayer(button.dataset.layer));

    part('opacity').addEventListener('input', event => {
      const now = view();
      opacity[now.map ? 'heatmap' : now.layer] = Number(event.target.value);
      schedule();
    });

    async function file(kind) {
      const {stem} = answer.picture, {w, h} = picture, word = focused() ?? words()[0], of = column();
      if (kind === 'picture') return [await asPng(drawnAt(w, h, on => on.drawImage(picture.image, 0, 0))), `${stem}.png`];
      if (kind === 'labels') return [await png(w, h, labelsAt(of, w, h), bytes(root.dataset.palette)), `${stem}-labels.png`];
      const name = `${stem}-${slug(word.label)}-${kind}.png`;
      if (kind === 'heatmap') {
        const scale = Math.max(1, LARGEST / Math.max(w, h)), size = [Math.round(w * scale), Math.round(h * scale)];
        return [await asPng(drawnAt(...size, on => paintHeat(on, ...size, word.map, topOf(word), opacity.heatmap, size))), name];
      }
      const mask = maskAt(word, of, w, h);
      if (kind === 'mask') return [await png(w, h, mask.map(inside => 255 * inside)), name];
      const data = new Uint32Array(pixelsOf(picture.image, w, h).buffer);
      return [await asPng(painted(w, h, i => mask[i] ? data[i] : 0)), name];
    }

    function drawnAt(w, h, paint) {
      const made = canvasOf(w, h), on = made.getContext('2d');
      on.imageSmoothingQuality = 'high';
      paint(on);
      return made;
    }

    for (const button of root.querySelectorAll('[data-save]')) {
      button.addEventListener('click', async () => {
        part('menu').open = false;
        download(...await file(button.dataset.save));
      });
    }
    part('menu').addEventListener('toggle', () => {
      if (!answer) return;
      const word = focused() ?? words()[0], {full} = answer.picture, {w, h} = picture;
      const names = {heatmap: 'Heatmap of ', mask: 'Mask of ', cutout: 'Cut-out of '};
      for (const button of root.querySelectorAll('[data-save]')) {
        const kind = button.dataset.save;
        if (names[kind]) setText(button, names[kind] + (word ? quoted(word.label) : 'a word'));
        button.disabled = kind !== 'picture' && !word;
      }
      setText(part('size'), full[0] === w && full[1] === h ? `PNG, ${w} × ${h} px` : `PNG, ${w} × ${h} px; full size: ${full[0]} × ${full[1]}`);
    });
    part('menu').addEventListener('focusout', event => {
      if (event.relatedTarget && !part('menu').contains(event.relatedTarget)) part('menu').open = false;
    });
    document.addEventListener('pointerdown', event => {
      if (part('menu')?.open && !part('menu').contains(event.target)) part('menu').open = false;
    });

    // ---- over the run

    for (const button of root.querySelectorAll('[data-over]')) {
      button.addEventListener('click', () => {
        const {over} = button.dataset, name = focused()?.label;
        if (!name) return;
        if (strip?.over === over && strip.label === name) closeStrip();
        else askStrip(over);
      });
    }

    function askStrip(over) {
      for (const button of root.querySelectorAll('[data-over]')) button.classList.toggle('waits', button.dataset.over === over);
      emit('ovam-strip', {label: focus, over});
    }

    // The one that was asked for is there, or does not come.
    function noStrip() {
      for (const button of root.querySelectorAll('[data-over]')) button.classList.remove('waits');
    }

    function closeStrip() {
      pause();
      strip = null;
      renderStrip();
      schedule();
    }

    function pause() {
      clearInterval(playing);
      playing = 0;
    }

    function play() {
      if (playing) return pause();
      if (strip.at >= strip.frames.length - 1) strip.at = -1;
      const next = () => {
        seek(strip.at + 1);
        if (strip.at >= strip.frames.length - 1) pause();
        markStrip();
      };
      playing = setInterval(next, FRAME_TIME);
      next();
    }

    function seek(at) {
      strip.at = at;
      markStrip();
      schedule();
    }

    const OVER = {steps: 'step by step', grids: 'grid by grid', layers: 'layer by layer', heads: 'head by head'};

    function renderStrip() {
      const box = part('strip');
      for (const button of root.querySelectorAll('[data-over]')) {
        button.setAttribute('aria-pressed', strip?.over === button.dataset.over && strip.label === focus);
      }
      box.hidden = !strip;
      if (!strip) return void box.replaceChildren();
      if (box.of !== strip) fillStrip(box);
      box.of = strip;
      markStrip();
    }

    function fillStrip(box) {
      const at = strip, last = at.frames.length - 1;
      const title = `${quoted(at.label)}, ${OVER[at.over] ?? at.over}`;
      const go = element('button', {class: 'v-play', 'data-part': 'play'}, 'Play');
      const scrub = element('input', {type: 'range', min: 0, max: last, step: 1, value: 0, 'aria-label': `Moment of ${title}`, 'data-part': 'scrub'});
      const close = element('button', {class: 'v-x', 'aria-label': 'Close the strip'}, '×');
      const film = element('button', {class: 'v-film', title: 'An animated WebP'}, 'Save');
      film.addEventListener('click', () => emit('ovam-film', {label: at.label, over: at.over}));
      go.addEventListener('click', () => { play(); markStrip(); });
      scrub.addEventListener('input', () => { pause(); seek(Number(scrub.value)); });
      close.addEventListener('click', closeStrip);
      const frames = element('div', {class: 'v-frames', 'data-part': 'frames'}, ...at.frames.map((one, number) => {
        const small = canvasOf(...lattice(1, 112));
        paintHeat(small.getContext('2d'), small.width, small.height, one.map, at.top, 0.7, [small.width, small.height]);
        const button = element('button', {'aria-label': `${at.label}, ${one.label}`, title: one.label}, small, element('span', {}, one.label));
        button.addEventListener('click', () => { pause(); seek(number); });
        return button;
      }));
      box.replaceChildren(element('header', {}, element('strong', {}, title), go, scrub,
        element('output', {'data-part': 'moment'}), film, close), frames);
    }

    function markStrip() {
      const box = part('strip'), frames = part('frames');
      if (!strip || !frames) return;
      [...frames.children].forEach((button, number) => button.setAttribute('aria-pressed', number === strip.at));
      const now = frames.children[strip.at];
      if (now) {
        const away = now.offsetLeft - frames.offsetLeft;
        if (away < frames.scrollLeft || away + now.offsetWidth > frames.scrollLeft + frames.clientWidth) {
          frames.scrollLeft = away - frames.clientWidth / 3;
        }
        part('scrub').value = strip.at;
      }
      setText(part('moment'), strip.frames[strip.at]?.label ?? '');
      setText(part('play'), playing ? 'Pause' : 'Play');
      box.querySelector('header').classList.toggle('plays', playing > 0);
    }

    // ---- methods side by side

    function renderColumns() {
      const box = part('columns');
      box.hidden = columns.length < 2;
      box.replaceChildren();
      if (box.hidden) return;
      columns.forEach((one, number) => {
        one.canvas = canvasOf(1, 1);
        one.peakLine = element('small');
        one.figure = element('button', {class: 'v-column', title: one.about}, one.canvas,
          element('span', {}, element('b', {}, one.method), one.peakLine));
        one.figure.disabled = Boolean(one.said);
        one.figure.addEventListener('click', () => {
          chosen = number;
          if (!focused()) focus = words()[0]?.label ?? null;
          renderCaption();
          renderChips();
        });
        box.append(one.figure);
      });
    }

    // ---- size

    // Of a window the part that leaves its words and the sliders in sight, as far as the picture stays large.
    function highest() {
      const high = window.innerHeight;
      return Math.max(240, high * 0.5, Math.min(high * 0.7, high - AROUND));
    }

    let width = 0;
    function fit() {
      const wide = width = part('stage').clientWidth;
      root.classList.toggle('narrow', wide < 560);
      if (!picture || !wide) return;
      const across = Math.floor(Math.min(wide, highest() * picture.w / picture.h));
      const down = Math.round(across * picture.h / picture.w);
      [canvas.style.width, canvas.style.height] = [`${across}px`, `${down}px`];
      const [w, h] = [Math.round(across * ratio()), Math.round(down * ratio())];
      if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
      for (const one of columns.length > 1 ? columns : []) {
        const room = one.canvas.clientWidth * ratio();
        if (room > 0) [one.canvas.width, one.canvas.height] = [Math.round(room), Math.round(room * picture.h / picture.w)];
      }
      renderCard();
      draw();
    }
    new ResizeObserver(() => part('stage').clientWidth !== width && requestAnimationFrame(fit)).observe(part('stage'));
    window.addEventListener('resize', fit);

    // ---- what the page calls

    async function pictureOf(sent) {
      const {key, picture: {src, width, height}} = sent;
      if (!src) return pictures.get(key) ?? null;
      const image = await loaded(src), made = {image, grey: greyed(image, width, height), w: width, h: height};
      pictures.delete(key);
      pictures.set(key, made);
      if (pictures.size > KEPT) pictures.delete(pictures.keys().next().value);
      return made;
    }

    async function columnOf(sent, w, h) {
      const attention = Object.fromEntries(Object.entries(sent.attention).map(([name, grid]) => [name, decode(grid)]));
      const all = sent.words.map(async word => (
        {...word, map: decode(word.map), mask: word.mask ? await maskOf(word.mask, w, h) : null}));
      return {...sent, attention, words: await Promise.all(all)};
    }

    async function show(sent) {
      const mine = ++turn, before = answer, stale = staleTurn;
      const {width, height} = sent.picture;
      const [image, made] = await Promise.all([pictureOf(sent), Promise.all(sent.columns.map(one => columnOf(one, width, height)))]);
      if (mine !== turn) return;
      if (!image) return lost(sent.key);
      const method = column().method, known = new Set(before?.key === sent.key ? columns.flatMap(one => one.words.map(x => x.label)) : []);
      [answer, columns, picture, hover] = [sent, made, image, null];
      chosen = Math.max(0, columns.findIndex(one => one.method === method && before?.columns.length > 1 && columns.length > 1));
      const fresh = words().filter(word => !known.has(word.label));
      if (known.size && fresh.length === 1) focus = fresh[0].label;
      if (!focused()) focus = words()[0]?.label ?? null;
      for (const word of words()) adding.delete(plain(word.label));
      if (before?.key !== sent.key) {
        takeOver();
        point = null;
        adding.clear();
        if (strip?.key !== sent.key) { pause(); strip = null; }
      }
      if (stale === staleTurn) setStale(null);
      root.classList.remove('empty');
      waiting = timer !== 0 || (serverWanted() && !sameCut() && wanted === wish());
      ask();
      renderColumns();
      renderCaption();
      renderStrip();
      renderChips();
      fit();
      if (before?.key === sent.key) renew(before);
    }

    // What was made for another answer about the same picture, and is not right beside this one.
    function renew(before) {
      if (groups.key === answer.key && groups.parts !== answer.parts) emit('ovam-candidates');
      if (!strip || strip.label !== focus) return;
      const mapIn = ({columns: all}) => all.flatMap(one => one.words).find(word => word.label === focus)?.map.data;
      if (mapIn(before) !== mapIn(answer)) askStrip(strip.over);
    }

    // Another picture comes with the settings that it was asked with; what was moved while it was made stays moved.
    function takeOver() {
      if (!touched.has('tau')) tau = null;
      if (!touched.has('alpha')) alpha = null;
      if (!touched.has('crf')) crf = null;
      touched.clear();
    }

    // The page has forgotten a picture that the server thought it had.
    function lost(key) {
      [answer, picture, columns] = [null, null, []];
      root.classList.add('empty');
      emit('ovam-lost', {key});
    }

    function setStale(reason) {
      staleTurn++;
      root.classList.toggle('stale', Boolean(reason));
      setText(part('stale'), reason ?? '');
    }

    const wish = () => `${answer.key} ${nowTau()} ${nowAlpha()} ${nowCrf()}`;

    // Once the sliders rest, the server's masks are asked for, once for each place where they rest.
    function ask() {
      clearTimeout(timer);
      timer = 0;
      if (!answer || !serverWanted()) { waiting = false; return; }
      if (wish() === wanted) return;
      waiting = true;
      timer = setTimeout(() => {
        [timer, wanted] = [0, wish()];
        emit('ovam-mask');
      }, RAW_AFTER);
    }

    function changed(name) {
      if (!answer || root.classList.contains('stale')) touched.add(name);
      if (!answer) return;
      if (!serverWanted()) wanted = '';
      ask();
      renderCard();
      schedule();
    }

    setLayer(layer);
    return {
      show,
      candidates(sent) {
        const all = sent?.groups ?? [];
        groups = {key: sent?.key ?? null, parts: sent?.parts, words: all.flatMap(({name, words: some}) => some.map(({label, map}) => (
          {label, group: name, kind: 'word', branch: 'conditional', map: decode(map)})))};
        renderChips();
      },
      strip(sent) {
        noStrip();
        pause();
        if (!sent || !answer || sent.key !== answer.key) return closeStrip();
        const frames = sent.frames.map(({label, map}) => ({label, map: decode(map)}));
        strip = {...sent, frames, top: Math.max(...frames.map(({map}) => map.top), 0), at: -1};
        renderStrip();
        schedule();
      },
      noStrip,
      stale: setStale,
      // What was asked for does not come.
      unanswered() {
        waiting = false;
        adding.clear();
        if (answer) renderChips();
      },
      tau(value) { tau = value; changed('tau'); },
      alpha(value) { alpha = value; changed('alpha'); },
      crf(value) { crf = value; changed('crf'); },
      words(text) {
        typed = text == null ? null : new Set(text.split(/[,;\n，、；]/).map(plain).filter(Boolean));
        adding.clear();
        if (answer) renderChips();
      },
      rank,
      // A word's mask as it stands, of one byte a pixel, at the size of the picture that was sent.
      mask(label) {
        const word = words().find(one => one.label === label);
        return {width: picture.w, height: picture.h, data: maskAt(word, column(), picture.w, picture.h)};
      },
    };
  };
})();
