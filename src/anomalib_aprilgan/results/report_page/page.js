"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const el = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const PER_PAGE = 60, NEAR = 0.05, BINS = 50;
  const FIELDS = ["path", "row", "score", "decision", "label", "p", "drift", "regions", "width", "height"];
  const images = data.images.map((values, index) => {
    const one = Object.fromEntries(FIELDS.map((name, place) => [name, values[place]]));
    return { ...one, index };
  });
  const cuts = data.classes.map((one) => one.cut);
  const marks = readMarks();
  const files = new Map();
  let chosen = data.classes.length === 1 ? 0 : -1;
  let list = [], page = 0, open = -1;

  // ---- decisions ------------------------------------------------------------------------------------------------
  function decision(one) {
    if (one.decision === "unreadable" || one.decision === "undecided" || one.score === null) return one.decision || "undecided";
    return one.score > cuts[one.row] ? "anomalous" : "good";
  }
  const inClass = (one) => chosen < 0 || one.row === chosen;
  const drifts = (one) => one.drift !== "" && one.drift !== "no";
  function needsALook(one) {
    const now = decision(one);
    if (now === "undecided" || now === "unreadable" || drifts(one)) return true;
    return Math.abs(one.score - cuts[one.row]) <= NEAR || (one.label !== "" && one.label !== now);
  }

  // ---- marks ----------------------------------------------------------------------------------------------------
  function readMarks() {
    try { return new Map(JSON.parse(localStorage.getItem(`aprilgan ${data.id}`) || "[]")); } catch { return new Map(); }
  }
  function mark(index, value) {
    if (value) marks.set(index, value); else marks.delete(index);
    try { localStorage.setItem(`aprilgan ${data.id}`, JSON.stringify([...marks])); } catch { /* no storage: until the page closes */ }
  }
  // No spreadsheet may take a field for a formula: paths then begin with ./ and names with an apostrophe.
  const formula = (text) => /^[=+\-@\t\r]/.test(text);
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  function corrections() {
    const lines = ["image_path,class_name,mark"];
    for (const [index, value] of [...marks].sort((a, b) => a[0] - b[0])) {
      const one = images[index];
      const name = data.classes[one.row] ? data.classes[one.row].name : "";
      lines.push([formula(one.path) ? `./${one.path}` : one.path, formula(name) ? `'${name}` : name, value].map(quoted).join(","));
    }
    return lines.join("\n") + "\n";
  }
  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([corrections()], { type: "text/csv" }));
    link.download = "corrections.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- copies of the images: in the page, or in files beside it ---------------------------------------------------
  const waiting = new Map();
  window.aprilganCopies = (number, copies) => waiting.get(number)(copies);
  function copiesOf(index) {
    if (!data.perFile) return Promise.resolve(data.copies[index]);
    const number = Math.floor(index / data.perFile);
    if (!files.has(number)) {
      files.set(number, new Promise((resolve) => waiting.set(number, resolve)));
      const script = document.createElement("script");
      script.src = `${data.files}/${number}.js`;
      script.onerror = () => waiting.get(number)([]);
      document.head.append(script);
      if (files.size > 8) files.delete(files.keys().next().value);  // what was asked for longest ago
    }
    return files.get(number).then((copies) => copies[index % data.perFile] || ["", ""]);
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------
  function svg(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function html(name, className, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function fill(view, one) {
    view.replaceChildren();
    copiesOf(one.index).then(([image, heat]) => {
      view.replaceChildren();
      if (!image) { view.append(html("span", "missing", one.decision === "unreadable" ? "cannot be read" : "the file is gone")); return; }
      const frame = html("div", "frame");
      const wide = one.width >= one.height;
      const box = view.getBoundingClientRect();
      const scale = Math.min(box.width / one.width, box.height / one.height);
      frame.style.width = box.width ? `${one.width * scale}px` : (wide ? "100%" : "auto");
      frame.style.height = box.width ? `${one.height * scale}px` : "auto";
      const picture = html("img");
      picture.src = image; picture.alt = "";
      frame.append(picture);
      if (heat && el("heat").checked) {
        const overlay = html("img", "heat");
        overlay.src = heat; overlay.alt = "";
        frame.append(overlay);
      }
      if (one.regions.length && el("regions").checked) {
        const boxes = svg("svg", { viewBox: `0 0 ${one.width} ${one.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
        for (const [x, y, width, height] of one.regions) boxes.append(svg("rect", { x, y, width, height }));
        frame.append(boxes);
      }
      view.append(frame);
    });
  }
  const scoreText = (one) => (one.score === null ? "no score" : one.score.toFixed(3));
  // The last folder too: files of many folders have the same names.
  const nameOf = (path) => path.split(/[\\/]/).slice(-2).join("/") || "(no file)";

  function card(one) {
    const node = html("button", "card");
    node.type = "button"; node.dataset.index = one.index;
    const view = html("div", "view");
    const caption = html("div", "caption");
    caption.append(html("span", decision(one), `${decision(one)} · ${scoreText(one)}`), html("span", "faint", nameOf(one.path)));
    node.append(view, caption);
    node.title = one.path;
    dress(node, one);
    node.addEventListener("click", () => show(list.indexOf(one)));
    return [node, view];
  }
  function dress(node, one) {
    node.classList.toggle("good-mark", marks.get(one.index) === "good");
    node.classList.toggle("bad-mark", marks.get(one.index) === "bad");
    node.setAttribute("aria-label", `${nameOf(one.path)}, ${decision(one)}, score ${scoreText(one)}${marks.has(one.index) ? `, marked ${marks.get(one.index)}` : ""}`);
  }

  function choose() {
    const wanted = el("decision").value, label = el("label").value, given = el("mark").value, part = el("name").value.toLowerCase();
    list = images.filter((one) => inClass(one)
      && (!wanted || decision(one) === wanted)
      && (!label || one.label === label)
      && (!given || (marks.get(one.index) || "none") === given)
      && (!part || one.path.toLowerCase().includes(part))
      && (!el("look").checked || needsALook(one)));
    const order = el("order").value, last = (one) => (one.score === null ? 1 : 0);
    if (order === "up") list.sort((a, b) => last(a) - last(b) || a.score - b.score);
    if (order === "near") list.sort((a, b) => last(a) - last(b) || Math.abs(a.score - cuts[a.row]) - Math.abs(b.score - cuts[b.row]));
    if (order === "path") list.sort((a, b) => (a.path < b.path ? -1 : 1));
  }
  function gallery() {
    const pages = Math.max(1, Math.ceil(list.length / PER_PAGE));
    page = Math.min(page, pages - 1);
    const cards = list.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((one) => [one, ...card(one)]);
    el("gallery").replaceChildren(...cards.map(([, node]) => node));
    for (const [one, , view] of cards) fill(view, one);
    el("shown").textContent = `${list.length} of ${images.filter(inClass).length} images`;
    el("page").textContent = `${page + 1} of ${pages}`;
    el("before").disabled = page === 0;
    el("after").disabled = page === pages - 1;
  }
  function counts() {
    const found = { images: 0, anomalous: 0, good: 0, undecided: 0, unreadable: 0 };
    for (const one of images) if (inClass(one)) { found.images += 1; found[decision(one)] += 1; }
    el("counts").replaceChildren(...Object.entries(found).filter(([name, number]) => number || name !== "undecided" && name !== "unreadable").map(([name, number]) => {
      const node = html("div", name);
      node.dataset.count = name;
      node.append(html("b", "", String(number)), document.createTextNode(name));
      return node;
    }));
    el("marked").textContent = `${marks.size} marked`;
    el("download").disabled = marks.size === 0;
  }

  // ---- threshold --------------------------------------------------------------------------------------------------
  function rawOf(knots, score) {
    if (!knots.length) return null;
    for (let place = 1; place < knots.length; place += 1) {
      const [[x0, y0], [x1, y1]] = [knots[place - 1], knots[place]];
      if (score <= y1 || place === knots.length - 1) return y1 === y0 ? x0 : x0 + (x1 - x0) * (score - y0) / (y1 - y0);
    }
    return knots[0][0];
  }
  // In the middle between the scores around it, so that rounding in a later run moves no image to the other side.
  function settled(row, cut) {
    let below = -Infinity, above = Infinity;
    for (const one of images) {
      if (one.row !== row || one.score === null) continue;
      if (one.score <= cut) below = Math.max(below, one.score); else above = Math.min(above, one.score);
    }
    return Number.isFinite(below) && Number.isFinite(above) ? (below + above) / 2 : cut;
  }
  function setting() {
    const one = chosen < 0 ? null : data.classes[chosen];
    el("set").hidden = !one;
    if (!one) return;
    const cut = cuts[chosen] === one.cut ? one.cut : settled(chosen, cuts[chosen]);
    const raw = rawOf(one.knots, cut);
    el("python").textContent = raw === null ? "The run wrote no thresholds.json, which tells raw scores." : `model.post_processor.of_class(${JSON.stringify(one.name)}).set_values(image_threshold=${Number(raw.toPrecision(9))})`;
    el("yaml-part").hidden = data.classes.length > 1;
    el("yaml").textContent = ["model:", "  init_args:", "    post_processor:", "      class_path: anomalib_aprilgan.decision.post_processing.AprilGANPostProcessor", "      init_args:", `        image_sensitivity: ${Number((1 - cut).toPrecision(7))}`].join("\n");
  }
  function histogram() {
    const width = 800, height = 120, node = el("histogram");
    node.setAttribute("viewBox", `0 0 ${width} ${height + 16}`);
    const bins = Array.from({ length: BINS }, () => [0, 0]);
    for (const one of images) {
      if (!inClass(one) || one.score === null) continue;
      bins[Math.min(BINS - 1, Math.max(0, Math.floor(one.score * BINS)))][one.score > cuts[one.row] ? 1 : 0] += 1;
    }
    const most = Math.max(1, ...bins.map(([good, bad]) => good + bad)), parts = [], step = width / BINS;
    bins.forEach(([good, bad], place) => {
      const heights = [good, bad].map((number) => (number / most) * height);
      parts.push(svg("rect", { class: "bar-good", x: place * step, y: height - heights[0], width: step - 1, height: heights[0] }));
      parts.push(svg("rect", { class: "bar-bad", x: place * step, y: height - heights[0] - heights[1], width: step - 1, height: heights[1] }));
    });
    const shown = chosen < 0 ? new Set(cuts) : new Set([cuts[chosen]]);
    for (const cut of shown) parts.push(svg("line", { class: "cut", x1: cut * width, x2: cut * width, y1: 0, y2: height }));
    for (const at of [0, 0.5, 1]) parts.push(svg("text", { x: at * width, y: height + 13, "text-anchor": ["start", "middle", "end"][at * 2] }, String(at)));
    node.replaceChildren(...parts);
  }
  function curve(id, points, now, names) {
    const node = el(id), side = 160;
    node.setAttribute("viewBox", `-24 -6 ${side + 34} ${side + 30}`);
    const at = ([x, y]) => `${x * side},${(1 - y) * side}`;
    node.replaceChildren(
      svg("rect", { class: "axis", x: 0, y: 0, width: side, height: side }),
      svg("polyline", { class: "curve", points: points.map(at).join(" ") }),
      svg("circle", { class: "now", cx: now[0] * side, cy: (1 - now[1]) * side, r: 4 }),
      svg("text", { x: side / 2, y: side + 14, "text-anchor": "middle" }, names[0]),
      svg("text", { x: -8, y: side / 2, "text-anchor": "middle", transform: `rotate(-90 -8 ${side / 2})` }, names[1]),
    );
  }
  function labelled() {
    const known = images.filter((one) => inClass(one) && one.label && one.score !== null);
    const defects = known.filter((one) => one.label === "anomalous").length, goods = known.length - defects;
    el("labelled").hidden = !known.length;
    el("label-label").hidden = !images.some((one) => one.label);
    if (!known.length) return;
    const cell = (label, now) => images.filter((one) => inClass(one) && one.label === label && decision(one) === now).length;
    const table = el("confusion"), rows = [["", "decided good", "decided anomalous"], ...["good", "anomalous"].map((label) => [`labelled ${label}`, cell(label, "good"), cell(label, "anomalous")])];
    table.replaceChildren(table.caption, ...rows.map((cells, row) => {
      const line = html("tr");
      line.append(...cells.map((text, column) => html(row && column ? "td" : "th", "", String(text))));
      return line;
    }));
    const sorted = [...known].sort((a, b) => b.score - a.score), roc = [[0, 0]], pr = [];
    let hits = 0, alarms = 0, area = 0, precision = 0;
    for (let place = 0; place < sorted.length;) {
      const score = sorted[place].score, before = [alarms, hits];
      for (; place < sorted.length && sorted[place].score === score; place += 1) if (sorted[place].label === "anomalous") hits += 1; else alarms += 1;
      area += ((alarms - before[0]) * (hits + before[1])) / 2;
      precision += (hits - before[1]) * (hits / (hits + alarms));
      roc.push([goods ? alarms / goods : 0, defects ? hits / defects : 0]);
      pr.push([defects ? hits / defects : 0, hits / (hits + alarms)]);
    }
    const found = cell("anomalous", "anomalous"), flagged = cell("good", "anomalous");
    curve("roc", roc, [goods ? flagged / goods : 0, defects ? found / defects : 0], ["false alarms", "defects found"]);
    curve("pr", pr, [defects ? found / defects : 0, found + flagged ? found / (found + flagged) : 1], ["recall", "precision"]);
    el("auroc").textContent = goods && defects ? `AUROC ${(area / goods / defects).toFixed(4)}` : "AUROC needs both labels";
    el("ap").textContent = defects ? `average precision ${(precision / defects).toFixed(4)}` : "";
  }

  // ---- large view ---------------------------------------------------------------------------------------------------
  function show(place) {
    if (place < 0 || place >= list.length) return;
    open = place;
    const one = list[place], dialog = el("large");
    if (!dialog.open) { dialog.showModal(); dialog.focus(); }  // not on a button: Enter would press it
    el("large-decision").textContent = decision(one).toUpperCase();
    el("large-decision").className = decision(one);
    el("large-score").textContent = `${scoreText(one)} · ${place + 1} of ${list.length}`;
    el("large-path").textContent = one.path;
    const facts = [data.classes.length > 1 ? data.classes[one.row].name : "", one.label && `labelled ${one.label}`, one.p && `p-value ${one.p}`, drifts(one) && `drift: ${one.drift}`, one.regions.length ? `${one.regions.length} region${one.regions.length > 1 ? "s" : ""}, ${one.regions.reduce((sum, region) => sum + region[4], 0)} pixels` : ""];
    el("large-facts").textContent = facts.filter(Boolean).join(" · ");
    for (const value of ["good", "bad"]) el(value).setAttribute("aria-pressed", String(marks.get(one.index) === value));
    el("previous").disabled = place === 0;
    el("next").disabled = place === list.length - 1;
    fill(el("large-view"), one);
  }
  function markOpen(value) {
    if (open < 0) return;
    const one = list[open];
    mark(one.index, value);
    counts();
    const node = el("gallery").querySelector(`[data-index="${one.index}"]`);
    if (node) dress(node, one);
    show(open);
  }
  function toggle(id) { el(id).checked = !el(id).checked; gallery(); if (open >= 0) show(open); }

  // ---- all together -------------------------------------------------------------------------------------------------
  function refresh() {
    el("slider").disabled = el("threshold").disabled = el("reset").disabled = chosen < 0;
    if (chosen >= 0) { el("slider").value = cuts[chosen]; el("threshold").value = Number(cuts[chosen].toFixed(6)); } else el("threshold").value = "";
    counts(); histogram(); labelled(); setting(); choose(); gallery();
  }
  function cutAt(text) {
    const value = Number(text);
    if (chosen < 0 || text === "" || !Number.isFinite(value)) return;
    cuts[chosen] = value;
    refresh();
  }
  if (data.classes.length > 1) el("class").append(new Option("all (choose one to move its threshold)", "-1"));
  data.classes.forEach((one, row) => el("class").append(new Option(one.name || "(no name)", String(row))));
  el("class-label").hidden = data.classes.length < 2;
  el("class").addEventListener("change", () => { chosen = Number(el("class").value); page = 0; refresh(); });
  el("slider").addEventListener("input", () => cutAt(el("slider").value));
  el("threshold").addEventListener("change", () => cutAt(el("threshold").value));
  el("reset").addEventListener("click", () => { cuts[chosen] = data.classes[chosen].cut; refresh(); });
  for (const id of ["decision", "label", "mark", "look", "order"]) el(id).addEventListener("change", () => { page = 0; choose(); gallery(); });
  el("name").addEventListener("input", () => { page = 0; choose(); gallery(); });
  for (const id of ["heat", "regions"]) el(id).addEventListener("change", gallery);
  el("before").addEventListener("click", () => { page -= 1; gallery(); window.scrollTo(0, el("gallery").offsetTop); });
  el("after").addEventListener("click", () => { page += 1; gallery(); window.scrollTo(0, el("gallery").offsetTop); });
  el("download").addEventListener("click", download);
  el("copy").addEventListener("click", () => navigator.clipboard && navigator.clipboard.writeText(el("python").textContent));
  el("previous").addEventListener("click", () => show(open - 1));
  el("next").addEventListener("click", () => show(open + 1));
  el("close").addEventListener("click", () => el("large").close());
  el("large").addEventListener("close", () => { open = -1; });
  el("good").addEventListener("click", () => markOpen("good"));
  el("bad").addEventListener("click", () => markOpen("bad"));
  el("unmark").addEventListener("click", () => markOpen(""));
  const keys = { ArrowLeft: () => show(open - 1), ArrowRight: () => show(open + 1), g: () => markOpen("good"), b: () => markOpen("bad"), u: () => markOpen(""), h: () => toggle("heat"), r: () => toggle("regions") };
  document.addEventListener("keydown", (event) => {
    const action = open < 0 ? null : keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
  window.addEventListener("resize", () => { gallery(); if (open >= 0) show(open); });
  refresh();
})();
