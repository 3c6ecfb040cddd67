// The behaviour of the explorer. Each fragment brings this script along, after explorer_page.js and in one scope with
// it; it wakes the explorers that still sleep. Texts reach the page as text nodes alone, never as markup.
const touch = matchMedia("(pointer: coarse)").matches;
const DASHES = ["solid", "dash", "dot"]; // colours come back after eight clusters

// -------------------------------------------------------------------------------------------------------------- texts
function plainText(text) {
  return text.split(/\r\n|\r|\n/).flatMap((line, index) => (index ? [newline(), line] : [line]));
}

const newline = () => element("span", { class: "polca-newline", title: "newline" }, "⏎");

function contextItem({ rank, before = "", target = "", after = "", title, url, attribution }) {
  const item = element("li", { "data-rank": rank }, element("span", { class: "polca-rank" }, `${rank}`));
  const mark = element("mark", {}, ...plainText(target));
  item.append(element("div", { class: "polca-text", dir: "auto" }, ...plainText(before), mark, ...plainText(after)));
  if (title || url || attribution) {
    const source = element("div", { class: "polca-source polca-muted" });
    const name = element("bdi", {}, title ?? url ?? "");
    const web = /^https?:\/\//i.test(url ?? "");
    source.append(web ? element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, name) : name);
    if (attribution) source.append(title || url ? " · " : "", element("bdi", {}, attribution));
    item.append(source);
  }
  return item;
}

// A label without how much it says.
const phrase = (label) => label.replace(/, \d+% of the cluster.*$/, "");

function vectorName({ vector }, clusters) {
  const name = vector === 0 ? "Exact loss, no vector" : `Vector ${vector}`;
  const count = clusters.length === 1 ? "1 cluster" : `${clusters.length || "no"} clusters`;
  const labels = [...new Set(clusters.map((one) => phrase(one.label)).filter(Boolean))].join(", ");
  const short = labels.length > 90 ? `${labels.slice(0, 89)}…` : labels;
  return `${name} · ${count}${short && `: ${short}`}`;
}

// ------------------------------------------------------------------------------------------------------- one explorer
function explore(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const { vectors, steps, palette, measures } = data;
  let position = data.start;
  let padding = false; // whether clusters of PAD are shown
  let chosen; // number of the chosen cluster
  let marked; // rank of the chosen token, if any
  let Plotly;

  const select = element("select", { "aria-label": "vector" });
  vectors.forEach((one, index) => select.append(element("option", { value: index })));
  const previous = element("button", { type: "button", "aria-label": "previous vector" }, "‹");
  const next = element("button", { type: "button", "aria-label": "next vector" }, "›");
  const names = [0, 1].map(() => element("div", { class: "polca-name" }));
  const plots = [0, 1].map(() => element("div", { class: "polca-plot" }));
  const panels = plots.map((plot, side) => element("div", { class: "polca-panel" }, names[side], plot));
  const plotRow = element(
    "div",
    { class: "polca-plots", tabindex: 0, role: "group", "aria-label": "curves; arrow keys change the vector" },
    ...panels,
  );
  const key = element("div", { class: "polca-key polca-muted" });
  const message = element("div", { class: "polca-message", role: "status", hidden: "" });
  const chips = element("div", { class: "polca-chips", role: "radiogroup", "aria-label": "cluster" });
  const heading = element("div", { class: "polca-name", "aria-live": "polite" });
  const table = element("div", { class: "polca-measures" });
  const list = element("ol", { class: "polca-contexts" });
  const about = element("div", { class: "polca-muted polca-about" });
  const bars = element("div", { class: "polca-composition" });
  const reading = element("div", { class: "polca-chosen" }, heading, about, bars, table, list);
  const query = element("input", { type: "search", placeholder: "search a token, a tag or a label" });
  query.setAttribute("aria-label", "search clusters by token, tag or label");
  const box = element("input", { type: "checkbox" });
  const toggle = element("label", { class: "polca-muted" }, box, " clusters of PAD");
  toggle.hidden = !vectors.some((one) => one.clusters.some((each) => each.padding));
  const tools = element("div", { class: "polca-tools" }, query, toggle);
  const results = element("div", { class: "polca-results", role: "status", hidden: "" });
  const head = [element("div", { class: "polca-title" }, data.title)];
  if (data.note) head.push(element("div", { class: "polca-muted" }, data.note));
  root.querySelector("p")?.remove();
  const bar = element("div", { class: "polca-bar" }, previous, select, next);
  root.append(...head, tools, results, bar, message, plotRow, key, chips, reading);

  const visible = (one) => one.clusters.filter((each) => padding || !each.padding);
  const clusters = () => (vectors.length ? visible(vectors[position]) : []);
  const find = (number) => clusters().find((one) => one.cluster === number);
  const colour = (number) => palette[root.dataset.scheme][number - 1];

  function nameVectors() {
    vectors.forEach((one, index) => select.options[index].replaceChildren(vectorName(one, visible(one))));
  }

  // Clusters with the text in a label, in what is said about them or as a token of a context: these first.
  function search() {
    const wanted = query.value.trim().toLowerCase();
    const found = [];
    vectors.forEach((one, index) => {
      for (const each of visible(one)) {
        const tokens = each.contexts.filter(({ target = "" }) => target.trim().toLowerCase() === wanted).length;
        const said = `${each.label} ${each.about}`.toLowerCase().includes(wanted);
        if (wanted && (tokens || said)) found.push({ index, each, tokens });
      }
    });
    found.sort((a, b) => b.tokens - a.tokens);
    results.hidden = !wanted;
    const count = `${found.length || "no"} cluster${found.length === 1 ? "" : "s"}`;
    results.replaceChildren(element("div", { class: "polca-muted" }, count));
    for (const { index, each } of found.slice(0, 12)) {
      const name = `${vectors[index].vector ? `vector ${vectors[index].vector}` : "exact loss"}, ${each.cluster}: `;
      const hit = element("button", { type: "button" }, name, element("bdi", {}, phrase(each.label) || "no label"));
      hit.addEventListener("click", () => {
        chooseVector(index);
        chooseCluster(each.cluster);
      });
      results.append(hit);
    }
  }

  // How many of each kind a cluster has: one bar, with what its parts are.
  function composition({ composition: parts, tokens, cluster }) {
    return parts.map(([kind, count]) => {
      const part = count / tokens;
      const bar = element("span", { class: "polca-share" });
      bar.style.setProperty("--share", `${100 * part}%`);
      bar.style.setProperty("--colour", colour(cluster));
      return element("div", {}, element("bdi", {}, kind), bar, `${count.toLocaleString("en")} · ${Math.round(100 * part)}%`);
    });
  }

  function chooseVector(index) {
    if (index < 0 || index >= vectors.length) return;
    position = index;
    select.value = index;
    previous.disabled = index === 0;
    next.disabled = index === vectors.length - 1;
    root.dataset.vector = vectors[index].vector;
    chips.replaceChildren(...clusters().map(chip));
    chooseCluster(clusters()[0]?.cluster);
  }

  function chooseCluster(number, rank) {
    chosen = number;
    marked = rank;
    root.dataset.cluster = number ?? "";
    for (const one of chips.children) {
      const own = Number(one.dataset.cluster) === number;
      one.setAttribute("aria-checked", own);
      one.tabIndex = own ? 0 : -1;
    }
    read(number);
    draw();
    mark(rank)?.scrollIntoView({ block: "nearest" });
  }

  function mark(rank) {
    list.querySelector("[aria-current]")?.removeAttribute("aria-current");
    const item = list.querySelector(`[data-rank="${rank}"]`);
    item?.setAttribute("aria-current", "true");
    return item;
  }

  // The contexts of a cluster: of the chosen one, or of the one under the pointer.
  function read(number) {
    const one = find(number);
    reading.dataset.cluster = number ?? "";
    heading.replaceChildren(one ? `Cluster ${number}: ` : "No clusters along this vector.");
    table.hidden = !one || !measures.length;
    about.replaceChildren(one?.about ?? "");
    bars.replaceChildren(...(one ? composition(one) : []));
    if (!one) return list.replaceChildren();
    reading.style.setProperty("--colour", colour(number));
    const facts = [`${one.tokens.toLocaleString("en")} tokens`];
    if (one.simple !== null) facts.push(one.simple ? "the label tells it apart" : "no label tells it apart");
    if (one.mirrors) facts.push(`moves against ${one.mirrors}`);
    heading.append(element("bdi", {}, one.label || "no label"), element("span", {}, ` · ${facts.join(" · ")}`));
    table.replaceChildren(
      ...measures.map((name, index) =>
        element("div", {}, element("div", { class: "polca-muted" }, name), one.measures[index]?.toFixed(3) ?? "-"),
      ),
    );
    const none = element("li", {}, element("div", { class: "polca-source polca-muted" }, "No contexts are kept."));
    list.replaceChildren(...(one.contexts.length ? one.contexts.map(contextItem) : [none]));
  }

  function chip({ cluster, tokens, label, simple, mirrors }) {
    const button = element(
      "button",
      { type: "button", class: "polca-chip", role: "radio", "data-cluster": cluster },
      element("span", { class: "polca-dot" }),
      element("span", { class: "polca-number" }, `${cluster}`),
      element("bdi", { class: `polca-label${simple === false ? " polca-vague" : ""}` }, label || "no label"),
      element("span", { class: "polca-muted" }, tokens.toLocaleString("en")),
    );
    button.style.setProperty("--colour", colour(cluster));
    if (mirrors) button.append(element("span", { class: "polca-muted polca-mirrors" }, `mirrors ${mirrors}`));
    button.addEventListener("click", () => chooseCluster(cluster));
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && preview(cluster));
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && preview(chosen, marked));
    return button;
  }

  function preview(number, rank) {
    if (reading.dataset.cluster !== `${number ?? ""}`) read(number);
    mark(rank);
    emphasise(number);
  }

  // ------------------------------------------------------------------------------------------------------------ plots
  const strength = (cluster, number) => (number === chosen || cluster === number ? 1 : 0.25);

  // Plotly reads markup in these: no text of the data may come here.
  const spoken = (name) => ({ hovertemplate: `${name}<br>step %{x:,}<br>%{y:.4~g} nats<extra></extra>` });

  // The curves of all clusters: each trace knows its cluster, and which single token it is.
  function traces(name, band) {
    const bands = [];
    const lines = [];
    const singles = [];
    for (const one of clusters()) {
      const own = one.cluster === chosen;
      const dash = DASHES[Math.floor((one.cluster - 1) / 8) % DASHES.length];
      const line = { color: colour(one.cluster), dash, width: own ? 3.2 : 1.8 };
      const about = { type: "scatter", mode: "lines", x: steps };
      lines.push({ ...about, y: one[name], line, meta: { cluster: one.cluster }, ...spoken(`cluster ${one.cluster}`) });
      if (!band) continue;
      const there = [...steps.keys()].filter((index) => one.low[index] !== null && one.high[index] !== null);
      const back = [...there].reverse();
      bands.push({
        ...about,
        x: [...there, ...back].map((index) => steps[index]),
        y: [...there.map((index) => one.high[index]), ...back.map((index) => one.low[index])],
        fill: "toself", fillcolor: `${colour(one.cluster)}${own ? "40" : "22"}`, line: { width: 0 },
        hoverinfo: "skip", meta: { cluster: one.cluster },
      });
      if (!own) continue;
      for (const { rank, values } of one.nearest) {
        const thin = { color: line.color, width: 1 };
        singles.push({ ...about, y: values, line: thin, meta: { cluster: chosen, rank }, ...spoken(`token ${rank}`) });
      }
    }
    return [...bands, ...singles, ...lines];
  }

  function layout(style) {
    const ink = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: ink("--rule"), zerolinecolor: ink("--rule"), linecolor: ink("--muted"), automargin: true,
      fixedrange: touch, ticks: "outside", ticklen: 4, tickcolor: ink("--rule"),
    };
    const upright = (x, line) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, layer: "below", line });
    const font = { family: style.fontFamily, size: 12 };
    const shapes = [];
    const { birth } = vectors[position] ?? {};
    if (data.hiddenAfter !== null) shapes.push(upright(data.hiddenAfter, { color: ink("--muted"), width: 1 }));
    if (birth != null) shapes.push(upright(birth, { color: ink("--ink"), width: 1.5, dash: "dot" }));
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", shapes, hovermode: "closest",
      font: { ...font, color: ink("--muted") },
      hoverlabel: { bgcolor: ink("--surface"), bordercolor: ink("--rule"), font: { ...font, color: ink("--ink") } },
      margin: { l: 44, r: 20, t: 8, b: 38 }, dragmode: touch ? false : "zoom", hoverdistance: touch ? 40 : 20,
      uirevision: `${position}`, showlegend: false,
      xaxis: { ...axis, showgrid: false, title: { text: "training step", standoff: 6 } },
      yaxis: axis,
    };
  }

  function draw() {
    const { vector, birth } = vectors[position] ?? {};
    const clustered = vector === 0 ? "Exact loss" : "Projected loss";
    names[0].replaceChildren(clustered, element("span", {}, " · medoid and quartiles, nats"));
    names[1].replaceChildren("Exact loss", element("span", {}, " · median of the same tokens, nats"));
    const explain = (text, look) => key.append(element("span", { class: look }, text));
    key.replaceChildren();
    if (birth != null) explain(`vector found, step ${birth.toLocaleString("en")}`);
    if (data.hiddenAfter !== null) explain(`hidden after, step ${data.hiddenAfter.toLocaleString("en")}`, "polca-tau");
    if (find(chosen)?.nearest.length) explain("thin: tokens nearest the medoid", "polca-plain");
    if (!Plotly) return;
    plotRow.hidden = key.hidden = !clusters().length;
    if (plotRow.hidden) return;
    const style = getComputedStyle(root);
    const config = { displayModeBar: false, responsive: true };
    ["medoid", "loss"].forEach((name, side) => {
      const first = !plots[side].data;
      Plotly.react(plots[side], traces(name, side === 0), layout(style), config);
      if (first) listen(plots[side]);
    });
  }

  // Pale all clusters but `number`; all are strong again when it is the chosen one.
  function emphasise(number) {
    if (!Plotly || plotRow.hidden) return;
    for (const plot of plots) {
      const opacity = plot.data.map(({ meta }) => strength(meta.cluster, number));
      Plotly.restyle(plot, { opacity });
    }
  }

  function listen(plot) {
    const under = (event) => event.points[0].data.meta;
    let hovered, pressed;
    const leave = () => {
      hovered = undefined;
      if (!touch) preview(chosen, marked);
    };
    // Plotly reports a hover late on a busy machine, when the pointer may have left, and then no end of it.
    plot.on("plotly_hover", (event) => {
      if (touch || !plot.matches(":hover")) return;
      hovered = under(event);
      preview(hovered.cluster, hovered.rank);
    });
    plot.on("plotly_unhover", leave);
    plot.addEventListener("pointerleave", leave);
    // A press ends Plotly's hover, and with it, where the press is short, Plotly's click: what was under it is kept here.
    plot.addEventListener("mousedown", ({ clientX, clientY }) => (pressed = { ...hovered, clientX, clientY }), true);
    plot.addEventListener("click", ({ clientX, clientY }) => {
      const still = pressed && Math.hypot(clientX - pressed.clientX, clientY - pressed.clientY) < 4;
      if (still && pressed.cluster !== undefined) setTimeout(() => chooseCluster(pressed.cluster, pressed.rank));
    });
    plot.on("plotly_click", (event) => {
      // Plotly is still busy with this very click: the curves change once it is done.
      setTimeout(() => chooseCluster(under(event).cluster, under(event).rank));
    });
  }

  function restyle() {
    if (root.dataset.scheme === scheme()) return;
    root.dataset.scheme = scheme();
    for (const one of chips.children) one.style.setProperty("--colour", colour(Number(one.dataset.cluster)));
    if (find(chosen)) bars.replaceChildren(...composition(find(chosen)));
    if (chosen !== undefined) reading.style.setProperty("--colour", colour(chosen));
    draw();
  }

  // --------------------------------------------------------------------------------------------------------- keyboard
  previous.addEventListener("click", () => chooseVector(position - 1));
  next.addEventListener("click", () => chooseVector(position + 1));
  select.addEventListener("change", () => chooseVector(Number(select.value)));
  query.addEventListener("input", search);
  box.addEventListener("change", () => {
    padding = box.checked;
    nameVectors();
    search();
    chooseVector(position);
  });
  root.addEventListener("keydown", (event) => {
    if (event.target === query) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step || event.target === select || event.altKey || event.ctrlKey || event.metaKey) return;
    const among = [...chips.children];
    const at = among.indexOf(event.target);
    if (at < 0 && /Up|Down/.test(event.key)) return; // these scroll the page
    event.preventDefault();
    event.stopPropagation(); // arrows may turn the pages of a book
    if (at < 0) return chooseVector(position + step);
    const to = among[(at + step + among.length) % among.length];
    to.focus();
    chooseCluster(Number(to.dataset.cluster));
  });

  // ------------------------------------------------------------------------------------------------------------ start
  root.dataset.scheme = scheme();
  onSchemeChange(restyle);
  plotRow.hidden = key.hidden = true;
  nameVectors();
  if (vectors.length) chooseVector(position);
  else read(); // says that there is nothing
  loadPlotly(data.plotly).then(
    (loaded) => {
      Plotly = loaded;
      draw();
      // A sidebar or a tab changes the width without the window's knowing.
      const fit = (plot) => plot.offsetWidth && plot.data && Plotly.Plots.resize(plot);
      new ResizeObserver(() => plots.forEach(fit)).observe(plotRow);
    },
    (error) => {
      const lost = `plotly.js could not be loaded from ${error.message}`;
      message.textContent = `The curves cannot be drawn: ${lost}. Clusters and contexts are below.`;
      message.hidden = false;
    },
  );
}

// JupyterLab may run this before the output is in the page.
function wake(patience) {
  const asleep = document.querySelectorAll(".polca-explorer:not([data-scheme])");
  asleep.forEach(explore);
  if (!asleep.length && patience) setTimeout(wake, 50, patience - 1);
}
wake(40);
