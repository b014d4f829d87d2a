"use strict";
// Shows what the model read for each token; payload() in page.py describes the data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const numbers = (name, kind) => {
    const bytes = Uint8Array.from(atob(data[name]), (char) => char.charCodeAt(0));
    return new kind(bytes.buffer);
  };
  const H = data.gates.length;
  const S = data.reads;
  const layers = data.layers; // the heads of each follow each other
  const perLayer = H / layers.length;
  const nameOf = (h) => (layers.length > 1 ? `layer ${layers[Math.floor(h / perLayer)]}, head ${h % perLayer}` : `head ${h}`);
  const first = data.position + data.begin + 1; // place in the stream of the first token shown
  const logp = numbers("logp", Float32Array);
  const without = numbers("without", Float32Array);
  const strongest = numbers("strongest", Uint16Array);
  const byHead = numbers("byHead", Uint8Array);
  const heads = numbers("heads", Int16Array);
  const chunks = numbers("chunks", Uint32Array);
  const scores = numbers("scores", Float32Array);
  const masses = numbers("masses", Uint16Array);
  const readGates = numbers("readGates", Uint16Array);
  const stored = numbers("text", Uint32Array);
  const gain = logp.map((x, i) => x - without[i]);

  // ---- texts: only the runs of the stream that are shown
  const offsets = [];
  data.runs.reduce((sum, [, length]) => (offsets.push(sum), sum + length), 0);
  function textAt(place) {
    let low = 0;
    let high = data.runs.length;
    while (low < high) { // find the first run that begins after the place
      const middle = (low + high) >> 1;
      if (data.runs[middle][0] <= place) low = middle + 1;
      else high = middle;
    }
    const run = low - 1;
    if (run < 0 || place >= data.runs[run][0] + data.runs[run][1]) return "";
    return data.texts[stored[offsets[run] + place - data.runs[run][0]]];
  }
  const documentOf = (place) => data.documents.find(([, begin, end]) => begin <= place && place < end);
  const visible = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "→\t") || "·";

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }
  const figure = (x, digits) => x.toFixed(digits);
  const whole = (x) => x.toLocaleString("en");

  // ---- the text
  const textBox = byId("text");
  const spans = [];
  const all = document.createDocumentFragment();
  for (let i = 0; i < data.length; i++) {
    const text = textAt(first + i);
    const span = element("span", visible(text), text === "" ? "mark" : "");
    span.number = i;
    spans.push(span);
    all.append(span);
  }
  textBox.append(all);

  // ---- colors
  const SCALES = { strongest: "gate × mass of the chunk read most, all heads", gain: "gain: log p with − without memory" };
  const select = byId("color");
  for (const [value, label] of Object.entries(SCALES)) select.add(new Option(label, value));
  data.gates.forEach((gate, h) => select.add(new Option(`gate × mass, ${nameOf(h)} (gate ${figure(gate, 2)})`, String(h))));
  function valuesOf(name) {
    if (name === "gain") return gain;
    if (name === "strongest") return Float32Array.from(strongest, (x) => x / 65535);
    return Float32Array.from({ length: data.length }, (_, i) => byHead[i * H + Number(name)] / 255);
  }
  function paint() {
    const name = select.value;
    const values = valuesOf(name);
    const sorted = Float32Array.from(values, Math.abs).sort();
    const top = Math.max(sorted[Math.floor(0.995 * (sorted.length - 1))], 1e-6); // the darkest 0.5 % exceed the scale
    for (let i = 0; i < spans.length; i++) {
      const share = Math.min(1, Math.abs(values[i]) / top);
      const rgb = name !== "gain" ? "232,89,12" : values[i] > 0 ? "24,140,60" : "150,60,180";
      spans[i].style.backgroundColor = share < 0.02 ? "" : `rgba(${rgb},${figure(0.85 * share, 3)})`;
    }
    const legend = byId("legend");
    legend.textContent = name === "gain" ? `−${figure(top, 2)}` : "0";
    const bar = element("i");
    const from = name === "gain" ? "rgba(150,60,180,.85),#fff,rgba(24,140,60,.85)" : "#fff,rgba(232,89,12,.85)";
    bar.style.backgroundImage = `linear-gradient(90deg,${from})`;
    legend.append(bar, name === "gain" ? `+${figure(top, 2)} nats` : figure(top, 2));
  }

  // ---- the panel: what one token read
  const panel = byId("panel");
  let outlined = [];
  function outline(indices, className) {
    for (const i of indices) {
      if (i < 0 || i >= spans.length) continue;
      spans[i].classList.add(className);
      outlined.push([spans[i], className]);
    }
  }
  function excerpt(place) {
    const code = element("code");
    const run = (from, to) => {
      let text = "";
      for (let p = from; p < to; p++) text += textAt(p);
      return text;
    };
    const end = place + data.chunk;
    const inside = documentOf(place);
    // Text before a document's start, or after its end, belongs to another document.
    const low = Math.max(place - data.around, inside ? inside[1] : place < data.position ? 0 : data.position);
    const high = inside ? Math.min(end + data.around, inside[2]) : end + data.around;
    const starts = inside ? inside[1] === place : place === data.position;
    code.append(run(low, place), element("mark", (starts ? "⟨start⟩" : "") + visible(run(place, end))), run(end, high));
    return code;
  }
  function show(i) {
    for (const [span, className] of outlined) span.classList.remove(className);
    outlined = [];
    outline([i], "chosen");
    panel.replaceChildren();
    panel.append(element("h2", `“${visible(textAt(first + i)).replace(/\n/g, "")}” — token ${whole(data.begin + i)}`));
    const p = (x) => `${figure(100 * Math.exp(x), 2)} %`;
    panel.append(element("p", `probability ${p(logp[i])}, without memory ${p(without[i])}; gain ${figure(gain[i], 2)} nats`));
    const list = element("ol");
    for (let r = 0; r < S; r++) {
      const at = i * S + r;
      const head = heads[at];
      if (head < 0) continue;
      const place = chunks[at];
      const mass = masses[at] / 65535;
      const gate = readGates[at] / 65535;
      const share = gate * mass;
      const item = element("li");
      const inside = documentOf(place);
      item.append(
        element("div", `${whole(first + i - place)} tokens back${inside ? `, in ${inside[0]}` : ""}`),
        element("div", `${nameOf(head)} · gate × mass ${figure(share, 3)} (${figure(gate, 2)} × ${figure(mass, 3)}) · score ${figure(scores[at], 2)}`, "figures"),
      );
      const bar = element("span", undefined, "bar");
      bar.style.width = `${figure(100 * share, 1)}%`;
      item.append(bar, excerpt(place));
      const inText = Array.from({ length: data.chunk }, (_, c) => place + c - first);
      if (inText[0] >= 0 && inText[0] < spans.length) {
        outline(inText, "read");
        item.classList.add("here");
        item.title = "go there";
        item.addEventListener("click", () => spans[inText[0]].scrollIntoView({ block: "center" }));
      }
      list.append(item);
    }
    if (!list.children.length) panel.append(element("p", "The memory was still empty at this token."));
    panel.append(list);
  }

  // ---- hovering shows a token, a click keeps it, Escape releases it
  let kept = -1;
  const target = (event) => (event.target.number === undefined ? -1 : event.target.number);
  function keep(i, scroll) {
    kept = i;
    show(i);
    if (scroll) spans[i].scrollIntoView({ block: "center" });
  }
  textBox.addEventListener("mouseover", (event) => { if (kept < 0 && target(event) >= 0) show(target(event)); });
  textBox.addEventListener("click", (event) => { if (target(event) >= 0) keep(target(event), false); });
  document.addEventListener("keydown", (event) => {
    if (event.target === select) return;
    if (event.key === "Escape") kept = -1;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && kept >= 0 && kept + step >= 0 && kept + step < spans.length) {
      keep(kept + step, false);
      spans[kept].scrollIntoView({ block: "nearest" });
      event.preventDefault();
    }
  });
  const ranked = Array.from(gain.keys()).sort((a, b) => gain[b] - gain[a]);
  let rank = -1;
  function jump(step) {
    rank = Math.min(Math.max(rank + step, 0), ranked.length - 1);
    keep(ranked[rank], true);
  }
  byId("next").addEventListener("click", () => jump(1));
  byId("previous").addEventListener("click", () => jump(-1));
  select.addEventListener("change", paint);

  // ---- the head
  const s = data.settings;
  const facts = byId("facts");
  facts.append(
    element("b", document.title), ` · tokens ${whole(data.begin)} to ${whole(data.begin + data.length - 1)} · perplexity `,
    element("b", figure(s.perplexity, 2)), ", without memory ", element("b", figure(s.without, 2)),
    s.perplexity_per_word === null ? "" : ` · per word ${figure(s.perplexity_per_word, 1)}`,
    s.bits_per_byte === null ? "" : ` · bits per byte ${figure(s.bits_per_byte, 3)}`,
    ` · read ${whole(s.distance)} tokens back on average · window ${whole(s.window)}, memory ${whole(s.memory)}, ` +
    `${whole(s.k)} tokens per query and head in chunks of ${data.chunk}, layer${layers.length > 1 ? "s" : ""} ${layers.join(", ")}, ${H} heads`,
  );
  panel.append(element("p", "Point at a token to see what was read to predict it; click to keep it; use the arrow keys to move on."),
    element("p", "A head outputs (1 − gate) × window + gate × memory, and its masses over all chunks that it reads sum to 1. So gate × mass is the share of a head's output that comes from one chunk. A dark token reads mostly one chunk; a pale one reads a little of many."));
  paint();
})();
