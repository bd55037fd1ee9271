// The page holds the rows as JSON; everything is put into the document as text, never as markup.
const data = readData("data");
const PAGE_ROWS = 20;
const FILTERS = ["split", "category", "sub_category", "decision", "kind", "phrasing", "review"];
const stateKey = "mirage-review:" + data.dataset_sha256;
const state = { page: 0, current: 0, shown: [], filters: {}, search: "", decisions: load() };

function load() {
  try { return JSON.parse(localStorage.getItem(stateKey)) || {}; } catch (error) { return {}; }
}
function keep() {
  try { localStorage.setItem(stateKey, JSON.stringify(state.decisions)); } catch (error) { /* private mode */ }
}
function reviewOf(row) {
  const decision = state.decisions[row.id];
  return decision && decision.status ? decision.status : "open";
}
function valueOf(row, name) {
  return name === "review" ? reviewOf(row) : row[name] || "";
}

function buildControls() {
  const controls = document.getElementById("controls");
  for (const name of FILTERS) {
    const values = name === "review" ? ["open", "accepted", "rejected"]
      : [...new Set(data.rows.map((row) => row[name] || ""))].filter(Boolean).sort();
    if (values.length < 2 && name !== "review") continue;
    const select = make("select", { id: "filter-" + name, onchange: (event) => {
      state.filters[name] = event.target.value; state.page = 0; apply();
    } }, make("option", { value: "", text: "all" }), ...values.map((value) => make("option", { value, text: value })));
    controls.append(make("label", { text: name.replace("_", " ") }, select));
  }
  controls.append(make("label", { text: "text" }, make("input", { id: "search", type: "search", oninput: (event) => {
    state.search = event.target.value.toLowerCase(); state.page = 0; apply();
  } })));
  controls.append(make("button", { id: "save", type: "button", text: "save decisions", onclick: save }));
}

function apply() {
  state.shown = data.rows.filter((row) =>
    FILTERS.every((name) => !state.filters[name] || valueOf(row, name) === state.filters[name]) &&
    (!state.search || row.haystack.includes(state.search)));
  const pages = Math.max(1, Math.ceil(state.shown.length / PAGE_ROWS));
  state.page = Math.min(state.page, pages - 1);
  state.current = 0;
  render();
}

function render() {
  const list = document.getElementById("rows");
  const first = state.page * PAGE_ROWS;
  list.replaceChildren(...state.shown.slice(first, first + PAGE_ROWS).map(card));
  const pages = Math.max(1, Math.ceil(state.shown.length / PAGE_ROWS));
  document.getElementById("page").textContent = `page ${state.page + 1} of ${pages}`;
  document.getElementById("previous").disabled = state.page === 0;
  document.getElementById("next").disabled = state.page >= pages - 1;
  count();
  mark();
}

function count() {
  const all = Object.values(state.decisions);
  const accepted = all.filter((decision) => decision.status === "accepted").length;
  const rejected = all.filter((decision) => decision.status === "rejected").length;
  document.getElementById("count").textContent =
    `${state.shown.length} of ${data.rows.length} rows shown; ${accepted} accepted, ${rejected} rejected`;
}

function card(row, offset) {
  const pictures = row.images.map((image, index) => make("figure", {},
    make("img", { src: image.src, alt: `image ${index + 1}: ${image.concept || "unnamed"}`, loading: "lazy" }),
    make("figcaption", { text: `${index + 1}. ${image.concept || "unnamed"} (${image.kind})` })));
  const answer = row.segments
    ? Object.entries(row.segments).flatMap(([name, text]) => [make("span", { class: name, title: name, text }), " "])
    : [row.answer || "(no reference answer: a test row)"];
  const decision = state.decisions[row.id] || {};
  const button = (status, label) => make("button", { type: "button", class: label,
    "aria-pressed": String(decision.status === status), text: label, onclick: () => decide(row, status) });
  const note = make("input", { type: "text", placeholder: "note", "aria-label": "note on row " + row.id,
    value: decision.note || "", oninput: (event) => annotate(row, event.target.value) });
  const facts = [row.split, row.category, row.sub_category, row.decision, row.kind, "row " + row.id]
    .filter(Boolean).join(" · ");
  const element = make("article", { id: "row-" + row.id, tabindex: "-1" },
    make("div", { class: "meta", text: facts }),
    make("div", { class: "pictures" }, ...pictures),
    make("div", { class: "question", text: row.question }),
    make("div", { class: "answer" }, ...answer),
    make("details", {}, make("summary", { text: "facts, checks and licences" }),
      make("pre", { text: JSON.stringify(row.details, null, 1) })),
    make("div", { class: "verdict" }, button("accepted", "accept"), button("rejected", "reject"), note));
  if (decision.status) element.classList.add(decision.status);
  element.addEventListener("click", () => { state.current = offset; mark(); });
  return element;
}

function entry(row) {
  return state.decisions[row.id] || (state.decisions[row.id] = { status: null, note: "" });
}
function decide(row, status) {
  const decision = entry(row);
  decision.status = decision.status === status ? null : status;
  prune(row);
  keep();
  replace(row);
}
function annotate(row, note) {
  entry(row).note = note;
  prune(row);
  keep();
}
function prune(row) {
  const decision = state.decisions[row.id];
  if (!decision.status && !decision.note) delete state.decisions[row.id];
}
function replace(row) {
  const offset = state.shown.indexOf(row) - state.page * PAGE_ROWS;
  const old = document.getElementById("row-" + row.id);
  if (old) old.replaceWith(card(row, offset));
  count();
  mark();
}
function mark() {
  [...document.querySelectorAll("article")].forEach((element, index) => {
    element.classList.toggle("current", index === state.current);
  });
}
function move(step) {
  const onPage = document.querySelectorAll("article").length;
  const next = state.current + step;
  if (next < 0 || next >= onPage) {
    const page = state.page + step;
    if (page < 0 || page * PAGE_ROWS >= state.shown.length) return;
    state.page = page;
    state.current = step > 0 ? 0 : PAGE_ROWS - 1;
    render();
  } else {
    state.current = next;
    mark();
  }
  const element = document.querySelectorAll("article")[state.current];
  if (element) { element.focus({ preventScroll: true }); element.scrollIntoView({ block: "nearest" }); }
}
function save() {
  const lines = data.rows.filter((row) => state.decisions[row.id]).map((row) => JSON.stringify({
    id: row.id, status: state.decisions[row.id].status || "open", note: state.decisions[row.id].note || "" }));
  const file = new Blob([lines.join("\n") + (lines.length ? "\n" : "")], { type: "application/jsonl" });
  const link = make("a", { href: URL.createObjectURL(file), download: "decisions.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

document.addEventListener("keydown", (event) => {
  if (isTyping(event)) return;
  const row = state.shown[state.page * PAGE_ROWS + state.current];
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (row && event.key === "a") decide(row, "accepted");
  else if (row && event.key === "r") decide(row, "rejected");
  else if (row && event.key === "u" && state.decisions[row.id]) { entry(row).status = null; prune(row); keep(); replace(row); }
  else return;
  event.preventDefault();
});
document.getElementById("previous").addEventListener("click", () => { state.page -= 1; state.current = 0; render(); scrollTo(0, 0); });
document.getElementById("next").addEventListener("click", () => { state.page += 1; state.current = 0; render(); scrollTo(0, 0); });
for (const row of data.rows) row.haystack = [row.question, row.answer || "", row.id, ...row.images.map((image) => image.concept || "")].join(" ").toLowerCase();
buildControls();
apply();
