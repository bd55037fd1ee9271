// The sample browser: a list that draws only the rows in sight, and a sample with two evaluations' answers.
const data = readData("samples-data");
const pictures = readData("pictures-data");
const ROW_HEIGHT = 64;
const TASK = 0, ID = 1, CATEGORY = 2, SUB = 3, QUESTION = 4, PICTURES = 5, TAGS = 6, CELLS = 7;
const ANSWER = 0, VERDICT = 1, REASON = 2, CUT = 3;
const say = (number) => data.strings[number];
const last = data.sets.length - 1;
const state = { left: 0, right: data.default_right, task: "", category: "", verdict: "", change: "", flip: "", search: "",
  shown: [], current: 0, marks: false };
const byId = (id) => document.getElementById(id);
const element = { list: byId("list"), sizer: byId("sizer"), detail: byId("detail"), count: byId("count"), flips: byId("flips"), controls: byId("controls") };

function answerText(number) {
  const answer = data.answers[number];
  return typeof answer === "string" ? answer : answer.filter((_, index) => index % 2).join("");
}
function verdictOf(sample, side) {
  const cell = sample[CELLS][side];
  return cell ? cell[VERDICT] : null;
}
function flipOf(sample) {
  const left = verdictOf(sample, state.left), right = verdictOf(sample, state.right);
  return left === null || right === null ? "" : say(left) + " → " + say(right);
}
function changed(sample) {
  const left = verdictOf(sample, state.left), right = verdictOf(sample, state.right);
  return left !== null && right !== null && left !== right;
}
function answerChanged(sample) {
  const left = sample[CELLS][state.left], right = sample[CELLS][state.right];
  return Boolean(left && right && left[ANSWER] !== right[ANSWER]);
}

// Filters. A text is looked for once in each different string, not once in each sample.
function searchHits(words) {
  const has = (text) => { const folded = text.toLowerCase(); return words.every((word) => folded.includes(word)); };
  return { strings: data.strings.map(has), answers: data.answers.map((_, number) => has(answerText(number))) };
}
function isHit(sample, hits) {
  if (hits.strings[sample[QUESTION]] || hits.strings[sample[ID]] || hits.strings[sample[TAGS]]) return true;
  return [state.left, state.right].some((side) => {
    const cell = sample[CELLS][side];
    return cell && (hits.answers[cell[ANSWER]] || hits.strings[cell[REASON]]);
  });
}
function fitsChange(sample) {
  if (state.change === "verdict") return changed(sample);
  if (state.change === "answer") return answerChanged(sample);
  return state.change !== "same" || (flipOf(sample) && !changed(sample));
}
function apply() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = words.length ? searchHits(words) : null;
  const matching = data.samples.filter((sample) =>
    (!state.task || say(sample[TASK]) === state.task) &&
    (!state.category || say(sample[CATEGORY]) === state.category || say(sample[CATEGORY]) + " / " + say(sample[SUB]) === state.category) &&
    (!state.verdict || (verdictOf(sample, state.right) !== null && say(verdictOf(sample, state.right)) === state.verdict)) &&
    (state.left === state.right || fitsChange(sample)) &&
    (!hits || isHit(sample, hits)));
  drawFlips(matching);
  state.shown = state.flip ? matching.filter((sample) => flipOf(sample) === state.flip) : matching;
  state.current = 0;
  element.list.scrollTop = 0;
  element.sizer.style.height = state.shown.length * ROW_HEIGHT + "px";
  element.count.textContent = `${state.shown.length.toLocaleString("en")} of ${data.samples.length.toLocaleString("en")} samples`;
  drawList(true);
  drawDetail();
}
function drawFlips(samples) {
  if (state.left === state.right) { element.flips.replaceChildren(); return; }
  const counts = new Map();
  for (const sample of samples) {
    const flip = flipOf(sample);
    if (flip) counts.set(flip, { count: (counts.get(flip) || { count: 0 }).count + 1, changed: changed(sample) });
  }
  if (state.flip && !counts.has(state.flip)) state.flip = "";
  const ordered = [...counts].sort((a, b) => b[1].changed - a[1].changed || b[1].count - a[1].count || (a[0] < b[0] ? -1 : 1));
  element.flips.replaceChildren(...ordered.slice(0, 24).map(([flip, found]) => make("button", {
    type: "button", "aria-pressed": String(state.flip === flip), text: `${flip}  ${found.count.toLocaleString("en")}`,
    onclick: () => { state.flip = state.flip === flip ? "" : flip; apply(); } })));
}

// The list: rows of one height, so that the place of each is known and only those in sight exist.
let drawn = "";
function drawList(anew) {
  const first = Math.max(0, Math.floor(element.list.scrollTop / ROW_HEIGHT) - 4);
  const end = Math.min(state.shown.length, Math.ceil((element.list.scrollTop + element.list.clientHeight) / ROW_HEIGHT) + 4);
  const key = first + ":" + end + ":" + state.current;
  if (!anew && key === drawn) return;
  drawn = key;
  const rows = [];
  for (let place = first; place < end; place += 1) rows.push(row(state.shown[place], place));
  if (!state.shown.length) rows.push(make("p", { class: "empty", text: "No sample fits these filters." }));
  element.sizer.replaceChildren(...rows);
  const current = state.shown.length ? "sample-" + state.current : null;
  if (current && state.current >= first && state.current < end) element.list.setAttribute("aria-activedescendant", current);
  else element.list.removeAttribute("aria-activedescendant");
}
function row(sample, place) {
  const flip = state.left === state.right ? "" : flipOf(sample);
  const right = verdictOf(sample, state.right);
  const verdict = flip && changed(sample) ? flip : right === null ? "not answered" : say(right);
  const thumbs = (sample[PICTURES] || []).slice(0, 3).filter((number) => number !== null)
    .map((number) => make("img", { src: pictures[number], alt: "" }));
  const item = make("div", { class: "item", role: "option", id: "sample-" + place, "aria-selected": String(place === state.current),
    "aria-posinset": place + 1, "aria-setsize": state.shown.length, onclick: () => choose(place, false) },
    make("div", { class: "line", text: say(sample[QUESTION]) }),
    make("div", { class: "thumbs" }, ...thumbs),
    make("div", { class: "line under" }, make("span", { class: flip && changed(sample) ? "chip moved" : "chip", text: verdict }),
      " " + say(sample[TASK]) + ", " + say(sample[CATEGORY])));
  item.style.top = place * ROW_HEIGHT + "px";
  return item;
}
function choose(place, scroll) {
  if (!state.shown.length) return;
  state.current = Math.max(0, Math.min(state.shown.length - 1, place));
  if (scroll) {
    const top = state.current * ROW_HEIGHT, view = element.list;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + ROW_HEIGHT > view.scrollTop + view.clientHeight) view.scrollTop = top + ROW_HEIGHT - view.clientHeight;
  }
  drawList(true);
  drawDetail();
}

// One sample.
function drawDetail() {
  const sample = state.shown[state.current];
  if (!sample) { element.detail.replaceChildren(); return; }
  const facts = [say(sample[TASK]), say(sample[CATEGORY]), say(sample[SUB]), say(sample[TAGS]), "sample " + say(sample[ID])];
  const sides = state.left === state.right ? [state.left] : [state.left, state.right];
  element.detail.replaceChildren(
    make("p", { class: "meta", text: `${(state.current + 1).toLocaleString("en")} of ${state.shown.length.toLocaleString("en")} · ${facts.filter(Boolean).join(" · ")}` }),
    pictureRow(sample),
    make("p", { class: "question", text: say(sample[QUESTION]) }),
    make("div", { class: "answers" }, ...sides.map((side) => answerBox(sample, side, sides))));
}
function pictureRow(sample) {
  const holder = make("div", { class: "pictures" });
  if (sample[PICTURES] === null) holder.append(make("p", { class: "soft", text: "Its pictures are not in this file, for its size." }));
  else holder.append(...sample[PICTURES].map((number, index) => number === null
    ? make("p", { class: "soft", text: `Picture ${index + 1} was not to be had.` })
    : make("figure", {}, make("img", { src: pictures[number], alt: `picture ${index + 1}` }), make("figcaption", { text: `picture ${index + 1}` }))));
  return holder;
}
function answerBox(sample, side, sides) {
  const cell = sample[CELLS][side];
  const box = make("div", { class: "answer" });
  const title = make("h4", {}, make("span", { text: data.sets[side] }));
  box.append(title);
  if (!cell) { box.append(make("p", { class: "soft", text: "This evaluation has no answer to it." })); return box; }
  title.append(make("span", { class: sides.length > 1 && changed(sample) ? "chip moved" : "chip", text: say(cell[VERDICT]) }));
  if (cell[CUT]) title.append(make("span", { class: "chip", text: "cut at the limit" }));
  const other = state.marks && sides.length > 1 ? sample[CELLS][sides[0] === side ? sides[1] : sides[0]] : null;
  box.append(answerParts(cell[ANSWER], other ? commonWords(answerText(cell[ANSWER]), answerText(other[ANSWER])) : null));
  box.append(make("p", { class: "soft", text: say(cell[REASON]) }));
  return box;
}
function answerParts(number, common) {
  const answer = data.answers[number], holder = make("div", { class: "text" });
  const counter = { at: 0 };
  if (typeof answer === "string") { holder.append(...marked(answer || "(empty)", common, counter)); return holder; }
  for (let at = 0; at < answer.length; at += 2) {
    const name = data.segments[answer[at]], text = answer[at + 1].trim();
    if (!name) holder.append(...marked(text, common, counter));
    else holder.append(make("span", { class: "part " + name }, make("b", { text: name }), ...marked(text, common, counter)));
  }
  return holder;
}
// Words that the other answer lacks are marked: what is outside the longest common sequence of words.
const MAX_WORDS = 600;
function wordsOf(text) { return text.split(/\s+/).filter(Boolean); }
function commonWords(text, other) {
  const a = wordsOf(text), b = wordsOf(other);
  if (a.length > MAX_WORDS || b.length > MAX_WORDS) return null;
  const width = b.length + 1, table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) for (let j = b.length - 1; j >= 0; j -= 1)
    table[i * width + j] = a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  const common = new Array(a.length).fill(false);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { common[i] = true; i += 1; j += 1; }
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1; else j += 1;
  }
  return common;
}
function marked(text, common, counter) {
  if (!common) return [text];
  return text.split(/(\s+)/).filter((piece) => piece !== "").map((piece) => {
    if (!piece.trim()) return piece;
    const isCommon = common[counter.at];
    counter.at += 1;
    return isCommon ? piece : make("mark", { text: piece });
  });
}

// Controls.
function select(id, label, options, value, onchange) {
  const box = make("select", { id, onchange: (event) => { onchange(event.target.value); apply(); } },
    ...options.map(([name, text]) => make("option", { value: name, text })));
  box.value = value;
  return make("label", { text: label }, box);
}
function values(get) {
  return [...new Set(data.samples.map(get))].sort((a, b) => (a < b ? -1 : 1));
}
function buildControls() {
  const all = (names) => [["", "all"], ...names.map((name) => [name, name])];
  const sets = data.sets.map((name, number) => [String(number), name]);
  const categories = new Map(values((sample) => say(sample[CATEGORY])).map((name) => [name, []]));
  for (const name of values((sample) => say(sample[CATEGORY]) + " / " + say(sample[SUB]))) {
    for (const [category, list] of categories) if (name.startsWith(category + " / ") && !list.includes(name)) list.push(name);
  }
  const nested = [["", "all"]];
  for (const [category, subs] of categories) {
    nested.push([category, category]);
    for (const name of subs) nested.push([name, " · " + name.slice(category.length + 3)]);
  }
  const verdicts = [...new Set(data.samples.flatMap((sample) => sample[CELLS].filter(Boolean).map((cell) => say(cell[VERDICT]))))].sort();
  if (data.sets.length > 1) element.controls.append(
    select("filter-left", "left", sets, String(state.left), (value) => { state.left = Number(value); }),
    select("filter-right", "right", sets, String(state.right), (value) => { state.right = Number(value); }));
  element.controls.append(
    select("filter-task", "task", all(data.samples.length ? [...new Set(data.samples.map((sample) => say(sample[TASK])))] : []), "", (value) => { state.task = value; }),
    select("filter-category", "category", nested, "", (value) => { state.category = value; }),
    select("filter-verdict", data.sets.length > 1 ? "verdict on the right" : "verdict", all(verdicts), "", (value) => { state.verdict = value; }));
  if (data.sets.length > 1) element.controls.append(select("filter-change", "left to right",
    [["", "all"], ["verdict", "verdict changed"], ["answer", "answer changed"], ["same", "verdict the same"]], "", (value) => { state.change = value; }));
  let waiting = 0;
  element.controls.append(make("label", { text: "text" }, make("input", { id: "search", type: "search", oninput: (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.search = event.target.value; apply(); }, 120);
  } })));
  if (data.sets.length > 1) element.controls.append(make("label", { class: "check" }, make("input", { id: "marks", type: "checkbox",
    onchange: (event) => { state.marks = event.target.checked; drawDetail(); } }), "mark the words that differ"));
}
function clearFilters() {
  Object.assign(state, { task: "", category: "", verdict: "", change: "", flip: "", search: "" });
  for (const id of ["filter-task", "filter-category", "filter-verdict", "filter-change", "search"]) if (byId(id)) byId(id).value = "";
  apply();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { if (event.target.blur && event.target.matches("input")) event.target.blur(); clearFilters(); return; }
  if (isTyping(event)) return;
  const inList = event.target === element.list;
  const page = Math.max(1, Math.floor(element.list.clientHeight / ROW_HEIGHT) - 1);
  if (event.key === "j" || (inList && event.key === "ArrowDown")) choose(state.current + 1, true);
  else if (event.key === "k" || (inList && event.key === "ArrowUp")) choose(state.current - 1, true);
  else if (inList && event.key === "PageDown") choose(state.current + page, true);
  else if (inList && event.key === "PageUp") choose(state.current - page, true);
  else if (inList && event.key === "Home") choose(0, true);
  else if (inList && event.key === "End") choose(state.shown.length - 1, true);
  else if (event.key === "/") byId("search").focus();
  else if (event.key === "c" && byId("filter-change")) { const box = byId("filter-change"); box.value = box.value === "verdict" ? "" : "verdict"; state.change = box.value; apply(); }
  else return;
  event.preventDefault();
});
element.list.addEventListener("scroll", () => drawList(false), { passive: true });
window.addEventListener("resize", () => drawList(false));
window.addEventListener("beforeprint", () => { for (const found of document.querySelectorAll("#data-card details, #recipe details")) found.open = false; });

byId("browser").hidden = false;
buildControls();
apply();
for (const holder of document.querySelectorAll("[data-sample]")) {
  const sample = data.samples[Number(holder.dataset.sample)];
  if (sample) holder.replaceWith(pictureRow(sample));
}
