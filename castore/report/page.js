"use strict";
// Draws the report from the JSON beside it. Strings from the repository become text nodes, never markup; none of them
// goes to the chart library, which reads markup in some.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = new Map(data.checkpoints.map((checkpoint) => [checkpoint.id, checkpoint]));
  const oldestFirst = [...data.checkpoints].reverse();
  const chartsDrawn = [];

  // -- words ----------------------------------------------------------------------------------------------------------

  const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const printable = (text) =>
    String(text).replace(INVISIBLE, (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0"));
  const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
  const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    return Math.abs(value) < 1e6 ? value.toFixed(4) : value.toPrecision(4);
  };
  const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");
  const size = (bytes) => {
    for (const unit of ["B", "kB", "MB", "GB"]) {
      if (bytes < 1000) return unit === "B" ? `${bytes.toFixed(0)} B` : `${bytes.toFixed(1)} ${unit}`;
      bytes /= 1000;
    }
    return `${bytes.toFixed(1)} TB`;
  };
  const time = (text) => `${text.slice(0, 10)} ${text.slice(11, 16)} UTC`;
  const short = (id) => id.slice(0, 12);
  const plural = (many, what) => `${count(many)} ${what}${many === 1 ? "" : "s"}`;
  const span = (seconds) => {
    if (seconds === null || seconds === undefined) return "–";
    if (seconds < 120) return `${seconds.toFixed(0)} s`;
    return seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
  };

  // -- elements ---------------------------------------------------------------------------------------------------------

  function h(tag, attributes, ...children) {
    const [name, ...classes] = tag.split(".");
    const made = document.createElement(name || "div");
    if (classes.length) made.className = classes.join(" ");
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
    }
    add(made, children);
    return made;
  }
  function add(parent, children) {
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      parent.append(child instanceof Node ? child : printable(child));
    }
    return parent;
  }
  function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  // text from the repository may run from right to left: it must not change the direction of what surrounds it
  const foreign = (text) => h("bdi", null, text);
  const link = (id) => {
    const known = byId.has(id);
    const label = `Manifest of checkpoint ${short(id)}`;
    return known
      ? h("button.link.id", { type: "button", "data-id": id, "aria-label": label, onclick: () => openPanel(id) }, short(id))
      : h("span.id.soft", { title: "not in this report" }, short(id));
  };
  const pill = (state) => h(`span.pill.${state}`, null, state);
  const terms = (pairs) => h("dl", null, pairs.map(([key, value]) => h("div", null, h("dt", null, key), h("dd", null, value))));

  const nav = document.getElementById("nav");
  const main = document.getElementById("main");
  function section(id, title, subtitle, ...children) {
    nav.append(h("a", { href: `#${id}` }, title));
    const head = h("div.head", null, h("h2", { id: `${id}-title` }, title), subtitle && h("p", null, subtitle));
    const made = h("section", { id, "aria-labelledby": `${id}-title` }, head, children);
    main.append(made);
    return made;
  }

  // -- groups: what a colour stands for ---------------------------------------------------------------------------------

  // distinct in the common kinds of colour blindness, each at 3:1 or more against white and against the dark page; the
  // shapes differ as well
  const COLOURS = ["#2a7fc4", "#c2611f", "#1f8a70", "#a25bc4", "#c24a77", "#84781a", "#5f7f96", "#b0574a"];
  const SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "cross"];
  const hidden = { run: new Set(), session: new Set() };
  let colourBy = "run";
  const groupOf = (checkpoint) => (colourBy === "run" ? checkpoint.run : checkpoint.session === null ? "no session" : `session ${checkpoint.session + 1}`);
  function groups() {
    const byName = new Map();
    for (const checkpoint of oldestFirst) {
      const name = groupOf(checkpoint);
      if (!byName.has(name)) {
        const i = byName.size;
        byName.set(name, { name, colour: COLOURS[i % 8], shape: SHAPES[(i + Math.floor(i / 8)) % 8], points: [] });
      }
      byName.get(name).points.push(checkpoint);
    }
    return [...byName.values()];
  }
  const shown = () => groups().filter((group) => !hidden[colourBy].has(group.name));
  const glyphs = {
    circle: ["circle", { cx: 8, cy: 8, r: 5 }],
    square: ["rect", { x: 3.5, y: 3.5, width: 9, height: 9 }],
    diamond: ["path", { d: "M8 2 L14 8 L8 14 L2 8Z" }],
    "triangle-up": ["path", { d: "M8 2.5 L14 13 L2 13Z" }],
    "triangle-down": ["path", { d: "M8 13.5 L14 3 L2 3Z" }],
    pentagon: ["path", { d: "M8 2 L14 6.5 L11.7 13.5 L4.3 13.5 L2 6.5Z" }],
    hexagon: ["path", { d: "M8 2 L13.5 5 L13.5 11 L8 14 L2.5 11 L2.5 5Z" }],
    cross: ["path", { d: "M6 2h4v4h4v4h-4v4h-4v-4h-4v-4h4Z" }],
  };
  function legend() {
    const box = h("div.legend", { role: "group", "aria-label": `Shown: ${colourBy}s` });
    for (const group of groups()) {
      const [tag, shape] = glyphs[group.shape];
      const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg(tag, { ...shape, fill: group.colour }));
      const isShown = !hidden[colourBy].has(group.name);
      const toggle = () => {
        isShown ? hidden[colourBy].add(group.name) : hidden[colourBy].delete(group.name);
        redraw();
        const again = [...document.querySelectorAll(".legend button")].find((button) => button.dataset.group === group.name);
        again?.focus();
      };
      const many = h("span.soft.small", null, count(group.points.length));
      box.append(
        h("button", { type: "button", "aria-pressed": String(isShown), "data-group": group.name, onclick: toggle }, icon, group.name, many),
      );
    }
    return box;
  }

  // -- charts ---------------------------------------------------------------------------------------------------------

  const LAYOUT = {
    margin: { l: 52, r: 14, t: 12, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    hovermode: "closest",
    hoverdistance: 24,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    font: { size: 12 },
  };
  const axis = (more) => ({ zeroline: false, showline: false, ticks: "", automargin: true, nticks: 8, ...more });
  const steps = () => axis({ separatethousands: true, tickformat: ",d", showgrid: false, ticklabelstandoff: 4, rangemode: "tozero" });

  // a loop may save without saying what follows what: then that is the checkpoint before, if its step is earlier
  const followed = new Map(), lastOf = new Map();
  for (const checkpoint of [...oldestFirst].sort((a, b) => (a.created < b.created ? -1 : Number(a.created > b.created)))) {
    const before = lastOf.get(checkpoint.run);
    if (checkpoint.parent !== null) followed.set(checkpoint, byId.get(checkpoint.parent));
    else if (before && before.step < checkpoint.step) followed.set(checkpoint, before);
    lastOf.set(checkpoint.run, checkpoint);
  }

  /** The points of a group's curves: consecutive checkpoints along the lineage, each branch from where it left its parent. */
  function strands(points, value) {
    const x = [], y = [];
    const inGroup = new Set(points);
    const next = new Map();
    for (const checkpoint of points) {
      const parent = followed.get(checkpoint);
      if (inGroup.has(parent) && !next.has(parent) && value(checkpoint) !== null) next.set(parent, checkpoint);
    }
    const continued = new Set(next.values());
    for (const start of points) {
      if (continued.has(start)) continue;
      const parent = followed.get(start);
      if (parent && value(parent) !== null) push(parent);
      for (let checkpoint = start; checkpoint; checkpoint = next.get(checkpoint)) push(checkpoint);
      x.push(null), y.push(null);
    }
    function push(checkpoint) {
      x.push(checkpoint.step), y.push(value(checkpoint));
    }
    return { x, y };
  }
  const lines = (group, value, line, opacity = 1) => ({
    type: "scatter", mode: "lines", hoverinfo: "skip", opacity,
    ...strands(group.points, value),
    line: { color: group.colour, width: 1.8, ...line },
  });
  function dots(points, value, marker) {
    const known = points.filter((checkpoint) => value(checkpoint) !== null);
    return {
      type: "scatter", mode: "markers", hoverinfo: "none",
      x: known.map((checkpoint) => checkpoint.step), y: known.map(value), customdata: known.map((checkpoint) => checkpoint.id),
      marker: { line: { width: 0 }, ...marker },
    };
  }
  const dotSize = () => (data.checkpoints.length > 400 ? 4.5 : data.checkpoints.length > 120 ? 5.5 : 7);
  function star(value) {
    const best = byId.get(data.best);
    if (!best || value(best) === null || hidden[colourBy].has(groupOf(best))) return [];
    return [{ ...dots([best], value, { symbol: "star", size: 17, color: "#e0a100", line: { width: 1.5, color: "#5c4200" } }), name: "best" }];
  }
  /** The training loss of a group's sessions, as each recorded it over spans of its steps. */
  function trained(group) {
    const x = [], y = [];
    data.sessions.forEach((session, i) => {
      const name = colourBy === "run" ? session.run : `session ${i + 1}`;
      if (!session.train_losses || name !== group.name) return;
      const { first, every, means } = session.train_losses;
      means.forEach((mean, at) => (x.push(Math.min(first + (at + 0.5) * every, session.final_step ?? Infinity)), y.push(mean)));
      x.push(null), y.push(null);
    });
    return { type: "scatter", mode: "lines", hoverinfo: "skip", opacity: 0.45, x, y, line: { color: group.colour, width: 1 } };
  }
  function overSteps(value, { dotted, shape } = {}) {
    const traces = [];
    for (const group of shown()) {
      if (dotted) traces.push(trained(group));
      if (dotted && group.points.some((checkpoint) => dotted(checkpoint) !== null))
        traces.push(lines(group, dotted, { dash: "dot", width: 1.3 }, 0.75));
      if (group.points.some((checkpoint) => value(checkpoint) !== null)) {
        traces.push(lines(group, value, { shape: shape ?? "linear" }));
        traces.push(dots(group.points, value, { color: group.colour, symbol: group.shape, size: dotSize() }));
      }
    }
    return [...traces, ...star(value)];
  }

  const tip = document.getElementById("tip");
  function showTip(id, x, y) {
    const checkpoint = byId.get(id);
    tip.replaceChildren();
    const rows = [["run", checkpoint.run], ["step", count(checkpoint.step)], ["score", checkpoint.score === null ? "–" : String(checkpoint.score)]];
    for (const [name, value] of Object.entries(checkpoint.metrics)) rows.push([name.slice(0, 40), String(value)]);
    if (checkpoint.connection_density !== null) rows.push(["density", percent(checkpoint.connection_density)]);
    rows.push(["data", checkpoint.availability], ["created", time(checkpoint.created)]);
    add(tip, [
      h("b", null, short(checkpoint.id), checkpoint.id === data.best && " – the best"),
      h("dl", null, rows.flatMap(([key, value]) => [h("dt", null, foreign(key)), h("dd", null, value)])),
      checkpoint.tags.length > 0 && h("div", null, "tags: ", foreign(checkpoint.tags.join(", ").slice(0, 160))),
    ]);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 16, innerWidth - box.width - 6))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 14) : y + 18}px`;
  }
  const hideTip = () => (tip.hidden = true);

  /** A chart that is drawn when it comes near the window, and again whenever what is shown changes. */
  function chart(id, label, height, make) {
    const box = h("div.chart", { id, tabindex: "0", role: "application", "aria-roledescription": "chart", "aria-label": `${label}. Left and right arrow keys go through the checkpoints, Enter shows a manifest.` });
    box.style.height = `${height}px`;
    let isDrawn = false, isWanted = false, order = [], at = -1;
    const draw = () => {
      isWanted = true;
      const { traces, layout } = make();
      Plotly.react(box, traces, { ...LAYOUT, height, ...layout }, { displayModeBar: false, responsive: true, doubleClick: "reset" });
      order = traces.flatMap((trace, t) => (trace.customdata ?? []).map((id, i) => ({ id, x: trace.x[i], y: trace.y[i], t })))
        .sort((a, b) => a.x - b.x || a.t - b.t);
      if (isDrawn) return;
      isDrawn = true;
      document.documentElement.dataset.drawn ??= String(Math.round(performance.now()));
      box.on("plotly_hover", (event) => showTip(event.points[0].customdata, event.event.clientX, event.event.clientY));
      box.on("plotly_unhover", hideTip);
      box.on("plotly_click", (event) => (hideTip(), openPanel(event.points[0].customdata, box)));
    };
    box.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move && order.length) {
        event.preventDefault();
        at = at < 0 ? (move > 0 ? 0 : order.length - 1) : (at + move + order.length) % order.length;
        const frame = box.getBoundingClientRect(), full = box._fullLayout, point = order[at];
        showTip(point.id, frame.left + full._size.l + full.xaxis.d2p(point.x), frame.top + full._size.t + full.yaxis.d2p(point.y));
        announce(`${short(point.id)}, step ${count(point.x)}, ${point.y}`);
      } else if (event.key === "Enter" && order[at]) openPanel(order[at].id, box);
      else if (event.key === "Escape") hideTip();
    });
    box.addEventListener("blur", hideTip);
    chartsDrawn.push({ draw, isWanted: () => isWanted });
    const nearby = new IntersectionObserver((seen) => {
      if (seen.some((entry) => entry.isIntersecting)) {
        nearby.disconnect();
        if (!isDrawn) draw();
      }
    }, { rootMargin: "300px" });
    // the charts' code comes last in the file, so that everything else can be read while it loads
    document.addEventListener("DOMContentLoaded", () => nearby.observe(box));
    return box;
  }
  function redraw() {
    for (const element of document.querySelectorAll(".legend")) element.replaceWith(legend());
    for (const chart of chartsDrawn) if (chart.isWanted()) chart.draw();
  }
  const live = h("div.skip", { "aria-live": "polite" });
  const announce = (text) => (live.textContent = printable(text));

  const metric = (name) => (checkpoint) => checkpoint.metrics[name] ?? null;
  function key(...items) {
    return h("p.key", null, items.filter(Boolean).map(([icon, text]) => h("span", null, icon, text)));
  }
  const stroke = (dash, width = 2) =>
    svg("svg", { viewBox: "0 0 24 14", "aria-hidden": "true" }, svg("path", { d: "M1 7H23", stroke: "currentColor", "stroke-width": width, "stroke-dasharray": dash, fill: "none" }));
  const starIcon = () =>
    svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: "M12 2l3 7h7l-5.6 4.6L18.500 21 12 16.800 5.500 21l2.100-7.400L2 9h7z", fill: "#e0a100", stroke: "#5c4200" }));

  function qualitySection() {
    const names = [...new Set(data.checkpoints.flatMap((checkpoint) => Object.keys(checkpoint.metrics)))].sort();
    const hasTraining = names.includes("train_loss");
    const hasSteps = data.sessions.some((session) => session.train_losses);
    const by = h("div.group", { role: "group", "aria-label": "Colour by" }, ["run", "session"].map((what) => {
      const choose = () => {
        colourBy = what;
        for (const button of by.children) button.setAttribute("aria-pressed", String(button.dataset.by === what));
        redraw();
      };
      return h("button", { type: "button", "data-by": what, "aria-pressed": String(what === colourBy), onclick: choose }, `By ${what}`);
    }));
    const log = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
      log.setAttribute("aria-pressed", String(log.getAttribute("aria-pressed") === "false"));
      redraw();
    } }, "Log scale");
    // where a session recorded all of its steps, the loss of single ones adds nothing
    const unrecorded = (checkpoint) => (data.sessions[checkpoint.session]?.train_losses ? null : metric("train_loss")(checkpoint));
    const loss = chart("chart-loss", "Loss over steps", 340, () => ({
      traces: overSteps(metric("val_loss"), { dotted: hasTraining ? unrecorded : null }),
      layout: { xaxis: steps(), yaxis: axis({ type: log.getAttribute("aria-pressed") === "true" ? "log" : "linear" }) },
    }));
    // values are positions in a list, since a metric's name may be anything
    const others = names.filter((name) => name !== "val_loss" && name !== "train_loss");
    let value = (checkpoint) => checkpoint.score;
    const choose = h("select", { "aria-label": "Measure", onchange: () => {
      value = choose.value === "score" ? (checkpoint) => checkpoint.score : metric(others[Number(choose.value)]);
      redraw();
    } }, h("option", { value: "score" }, "Score"), others.map((name, i) => h("option", { value: String(i) }, name.slice(0, 60))));
    const score = chart("chart-score", "Score or metric over steps", 260, () => ({
      traces: overSteps((checkpoint) => value(checkpoint)), layout: { xaxis: steps(), yaxis: axis({}) },
    }));
    const density = (checkpoint) => checkpoint.connection_density;
    const speed = (checkpoint) => checkpoint.tokens_per_second;
    const hasDensity = data.checkpoints.some((checkpoint) => density(checkpoint) !== null);
    const hasSpeed = data.checkpoints.some((checkpoint) => speed(checkpoint) !== null);
    section(
      "quality", "Quality", "Measured at each checkpoint, over global steps. Drag to zoom, double-click to reset.",
      h("div.card", null,
        h("div.cardhead", null, h("h3", null, "Loss"), h("div.tools", null, log, by)),
        loss,
        key([stroke("0"), "validation"], hasSteps && [stroke("0", 1), "training, every step"], hasTraining && data.checkpoints.some((checkpoint) => unrecorded(checkpoint) !== null) && [stroke("3 3", 1.5), "training"], data.best && [starIcon(), "the best"]),
        legend()),
      h("div.pair", { id: "pair" },
        h("div.card", null, h("div.cardhead", null, h("h3", null, "Score and metrics"), h("div.tools", null, choose)), score),
        hasDensity && h("div.card", null,
          h("div.cardhead", null, h("h3", null, "Active connections"), h("span.soft.small", null, "share that is not zero")),
          chart("chart-density", "Share of active connections over steps", 260, () => ({
            traces: overSteps(density, { shape: "hv" }).filter((trace) => trace.name !== "best"),
            layout: { xaxis: steps(), yaxis: axis({ tickformat: ".0%", rangemode: "tozero" }) },
          }))),
        !hasDensity && hasSpeed && h("div.card", null,
          h("div.cardhead", null, h("h3", null, "Speed"), h("span.soft.small", null, "tokens per second")),
          chart("chart-speed", "Tokens per second over steps", 260, () => ({
            traces: overSteps(speed).filter((trace) => trace.name !== "best"), layout: { xaxis: steps(), yaxis: axis({ rangemode: "tozero" }) },
          })))),
    );
    document.getElementById("pair").style.marginTop = "1rem";
  }

  function lineageSection() {
    const onPath = oldestFirst.filter((checkpoint) => checkpoint.on_best_path);
    const rows = 1 + Math.max(...data.checkpoints.map((checkpoint) => checkpoint.lane));
    const most = Math.max(...data.checkpoints.map((checkpoint) => checkpoint.step));
    const bend = Math.max(1, most * 0.012);
    const place = (checkpoint) => checkpoint.lane;
    function edges(chosen) {
      const x = [], y = [];
      for (const checkpoint of chosen) {
        const parent = byId.get(checkpoint.parent);
        if (!parent) continue;
        const turn = Math.min(parent.step + bend, checkpoint.step);
        x.push(parent.step, turn, checkpoint.step, null), y.push(parent.lane, checkpoint.lane, checkpoint.lane, null);
      }
      return { type: "scatter", mode: "lines", hoverinfo: "skip", x, y };
    }
    const isShown = (checkpoint) => !hidden[colourBy].has(groupOf(checkpoint));
    const big = dotSize() + 3;
    const look = {
      full: (group) => ({ symbol: group.shape, color: group.colour, size: big, line: { width: 0 } }),
      "weights-only": (group) => ({ symbol: `${group.shape}-open-dot`, color: group.colour, size: big, line: { width: 2 } }),
      history: (group) => ({ symbol: `${group.shape}-open`, color: group.colour, size: big - 3, line: { width: 1.3 } }),
    };
    const drawing = chart("chart-lineage", "Lineage of checkpoints", Math.min(620, Math.max(150, 64 + rows * 34)), () => ({
      traces: [
        { ...edges(data.checkpoints.filter((checkpoint) => isShown(checkpoint) && !checkpoint.on_best_path)), line: { color: "#8d939b", width: 1.3 } },
        { ...edges(onPath.filter(isShown)), line: { color: "#e0a100", width: data.checkpoints.length > 120 ? big + 5 : 6 }, opacity: 0.5 },
        ...shown().flatMap((group) => Object.keys(look).map((state) =>
          dots(group.points.filter((checkpoint) => checkpoint.availability === state), place, look[state](group)))),
        ...star(place),
      ],
      layout: {
        xaxis: steps(), margin: { ...LAYOUT.margin, l: 16 },
        yaxis: axis({ visible: false, range: [rows - 0.4, -0.6], fixedrange: true }),
      },
    }));
    const from = onPath.length ? onPath[onPath.length - 1] : null;
    const turns = onPath.filter((checkpoint, i) => i === 0 || i === onPath.length - 1 || checkpoint.session !== onPath[i - 1].session);
    const circle = (more) => svg("svg", { viewBox: "0 0 24 14", "aria-hidden": "true" }, svg("circle", { cx: 12, cy: 7, r: 4.5, ...more }));
    section(
      "lineage", "Lineage", "Which checkpoint was resumed from which, from left to right; the path to the best is highlighted.",
      h("div.card", null,
        drawing,
        key(
          [stroke("0", 6), "path to the best"],
          [circle({ fill: "currentColor" }), "full"],
          [svg("svg", { viewBox: "0 0 24 14", "aria-hidden": "true" }, svg("circle", { cx: 12, cy: 7, r: 4.5, fill: "none", stroke: "currentColor", "stroke-width": 2 }), svg("circle", { cx: 12, cy: 7, r: 1.6, fill: "currentColor" })), "weights only"],
          [circle({ fill: "none", stroke: "currentColor", r: 3.2 }), "history: its data is gone"],
        ),
        legend(),
        from && h("h3", { id: "path-title" }, `Path to the best: ${plural(onPath.length, "checkpoint")}`),
        from && h("p.soft.small", null, turns.length < onPath.length && "The first of each session, and the best, with their steps:"),
        from && h("ol.path", { "aria-labelledby": "path-title" }, turns.length > 12 && h("li.soft", null, plural(turns.length - 12, "session"), " before"), turns.slice(-12).map((checkpoint) => h("li", null, link(checkpoint.id), h("span.soft", null, ` ${count(checkpoint.step)}`))))),
    );
    document.getElementById("path-title")?.style.setProperty("margin-top", "0.9rem");
  }

  // -- settings -------------------------------------------------------------------------------------------------------

  const configs = new Map(data.checkpoints.map((checkpoint, i) => [checkpoint, data.values[data.manifests[i][1]]]));
  function flat(config, prefix = "", into = new Map()) {
    for (const [name, value] of Object.entries(config ?? {})) {
      if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) flat(value, `${prefix}${name}.`, into);
      else into.set(prefix + name, value);
    }
    return into;
  }
  const flatByConfig = new Map();
  const settingsOf = (checkpoint) => {
    const config = configs.get(checkpoint);
    if (!flatByConfig.has(config)) flatByConfig.set(config, flat(config));
    return flatByConfig.get(config);
  };
  const shownValue = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  /** The settings that checkpoints differ in, those with the fewest values first. */
  function differing(checkpoints) {
    const distinct = [...new Set(checkpoints.map(settingsOf))];
    const names = [...new Set(distinct.flatMap((settings) => [...settings.keys()]))];
    const kinds = (name) => new Set(distinct.map((settings) => JSON.stringify(settings.get(name)))).size;
    return names.map((name) => [name, kinds(name)]).filter(([, many]) => many > 1).sort((a, b) => a[1] - b[1] || (a[0] < b[0] ? -1 : 1)).map(([name]) => name);
  }

  /** The settings of the newest checkpoint of each run, side by side. */
  function settingsSection() {
    const newest = new Map();
    for (const checkpoint of data.checkpoints) if (!newest.has(checkpoint.run)) newest.set(checkpoint.run, checkpoint);
    const columns = [...newest.values()];
    const names = differing(columns), all = new Set(columns.flatMap((checkpoint) => [...settingsOf(checkpoint).keys()]));
    if (!all.size) return;
    const same = Object.fromEntries([...all].filter((name) => !names.includes(name)).sort().map((name) => [name, settingsOf(columns[0]).get(name)]));
    const rows = names.map((name) => h("tr", null, h("th.words", { scope: "row" }, foreign(name)), columns.map((checkpoint) => h("td.words", null, foreign(shownValue(settingsOf(checkpoint).get(name)))))));
    const heads = columns.map((checkpoint) => h("th", { scope: "col" }, checkpoint.run, h("div.soft.small", null, link(checkpoint.id))));
    section("settings", "Settings", columns.length > 1 ? (names.length ? "Where runs differ, as of the newest checkpoint of each." : "The same in all runs.") : "Of the newest checkpoint.",
      h("div.card.flow", null,
        names.length > 0 && h("div.wide", null, h("table.settings", null, h("caption.skip", null, "Settings that differ between runs"), h("thead", null, h("tr", null, h("th", { scope: "col" }, "Setting"), heads)), h("tbody", null, rows))),
        Object.keys(same).length > 0 && h("details", { open: !names.length && columns.length === 1 }, h("summary", null, columns.length > 1 ? `${plural(Object.keys(same).length, "setting")} the same in all runs` : plural(Object.keys(same).length, "setting")), fields(same))));
  }

  // -- the table of checkpoints ---------------------------------------------------------------------------------------

  function table(columns, rows, { first = 25, caption, sortBy = null, downwards = true, rowClass } = {}) {
    let sorted = { column: sortBy, downwards }, limit = first, current = rows;
    const body = h("tbody");
    const heads = columns.map((column, i) => {
      if (!column.sort) return h(`th${column.css ?? ""}`, { scope: "col" }, column.name);
      const flip = () => {
        sorted = { column: i, downwards: sorted.column === i ? !sorted.downwards : column.css?.includes("num") ?? false };
        show();
      };
      return h(`th${column.css ?? ""}`, { scope: "col" }, h("button", { type: "button", onclick: flip }, column.name));
    });
    const foot = h("div.tablefoot");
    const made = h("div", null, h("div.wide", null, h("table", null, h("caption.skip", null, caption), h("thead", null, h("tr", null, heads)), body)), foot);
    function show(keepFocus) {
      const column = columns[sorted.column];
      let listed = current;
      if (column) {
        const sign = sorted.downwards ? -1 : 1;
        listed = [...current].sort((a, b) => {
          const [x, y] = [column.sort(a), column.sort(b)];
          if (x === y) return 0;
          if (x === null) return 1; // what was not measured comes last in either order
          if (y === null) return -1;
          return x < y ? -sign : sign;
        });
      }
      heads.forEach((head, i) => {
        if (i === sorted.column) head.setAttribute("aria-sort", sorted.downwards ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      body.replaceChildren(...listed.slice(0, limit).map((record) => {
        const row = h(`tr${rowClass ? rowClass(record) : ""}`, null, columns.map((column) => h(`td${column.css ?? ""}`, null, column.cell(record))));
        if (record.id && byId.has(record.id)) {
          row.classList.add("row");
          row.addEventListener("click", (event) => event.target.closest("button, a, summary") || openPanel(record.id, row.querySelector("button")));
        }
        return row;
      }));
      const left = listed.length - limit;
      foot.replaceChildren();
      const summary = h("span.soft.small", { "aria-live": "polite" }, listed.length === rows.length ? plural(rows.length, "row") : `${count(listed.length)} of ${plural(rows.length, "row")}`, left > 0 && `, ${count(limit)} shown`);
      add(foot, [summary, left > 0 && h("button", { type: "button", onclick: () => ((limit += 100), show(true)) }, `Show ${count(Math.min(100, left))} more`), left > 100 && h("button", { type: "button", onclick: () => ((limit = Infinity), show(true)) }, "Show all")]);
      if (keepFocus) foot.querySelector("button")?.focus();
    }
    show();
    made.filter = (predicate) => ((current = rows.filter(predicate)), (limit = first), show());
    return made;
  }
  const byText = (texts) => texts.map(printable).join(" ").toLowerCase();

  function checkpointsSection() {
    const latest = new Map(data.checkpoints.map((checkpoint, i) => [checkpoint, data.checkpoints.length - i]));
    const bytes = (checkpoint) => Object.values(checkpoint.parts).reduce((sum, part) => sum + part.stored_bytes, 0);
    const hyper = differing(data.checkpoints).filter((name) => data.checkpoints.every((checkpoint) => typeof settingsOf(checkpoint).get(name) !== "object"));
    const setting = (name) => ({
      name: name.split(".").at(-1).slice(0, 24), css: ".num.phone.less",
      sort: (checkpoint) => settingsOf(checkpoint).get(name) ?? null, cell: (checkpoint) => foreign(shownValue(settingsOf(checkpoint).get(name))),
    });
    const columns = [
      { name: "Checkpoint", sort: (checkpoint) => latest.get(checkpoint), cell: (checkpoint) => [link(checkpoint.id), checkpoint.id === data.best && [" ", h("span.badge.gold", null, "best")], checkpoint.id === data.next?.id && checkpoint.id !== data.best && [" ", h("span.badge", null, "next")]] },
      { name: "Run", css: ".run.phone", sort: (checkpoint) => checkpoint.run, cell: (checkpoint) => checkpoint.run },
      { name: "Step", css: ".num", sort: (checkpoint) => checkpoint.step, cell: (checkpoint) => count(checkpoint.step) },
      { name: "Val loss", css: ".num", sort: (checkpoint) => checkpoint.metrics.val_loss ?? null, cell: (checkpoint) => number(checkpoint.metrics.val_loss) },
      { name: "Score", css: ".num.phone", sort: (checkpoint) => checkpoint.score, cell: (checkpoint) => number(checkpoint.score) },
      { name: "Data", sort: (checkpoint) => checkpoint.availability, cell: (checkpoint) => pill(checkpoint.availability) },
      ...hyper.slice(0, 3).map(setting),
      { name: "Size", css: ".num.phone.less", sort: bytes, cell: (checkpoint) => size(bytes(checkpoint)) },
      { name: "Created", css: ".num.less", sort: (checkpoint) => checkpoint.created, cell: (checkpoint) => time(checkpoint.created).slice(0, -4) },
      { name: "Tags and note", css: ".tags.phone", cell: (checkpoint) => h("div.clip", null, checkpoint.tags.map((tag) => [h("span.badge", null, foreign(tag)), " "]), foreign(checkpoint.note)) },
    ];
    const made = table(columns, data.checkpoints, { caption: "Checkpoints", rowClass: (checkpoint) => (checkpoint.id === data.best ? ".best" : "") });
    const words = new Map(data.checkpoints.map((checkpoint) => [checkpoint, byText([checkpoint.id, checkpoint.run, checkpoint.note, ...checkpoint.tags])]));
    const text = h("input", { type: "search", placeholder: "Filter by id, run, tag or note", "aria-label": "Filter checkpoints", oninput: () => apply() });
    const runs = [...new Set(data.checkpoints.map((checkpoint) => checkpoint.run))].sort();
    const run = h("select", { "aria-label": "Run", onchange: () => apply() }, h("option", { value: "" }, "All runs"), runs.map((name) => h("option", { value: name }, name)));
    const state = h("select", { "aria-label": "Data", onchange: () => apply() }, h("option", { value: "" }, "Any data"), ["full", "weights-only", "history"].map((name) => h("option", { value: name }, name)));
    const path = h("input", { type: "checkbox", onchange: () => apply() });
    function apply() {
      const needed = text.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      made.filter((checkpoint) => (!run.value || checkpoint.run === run.value) && (!state.value || checkpoint.availability === state.value) && (!path.checked || checkpoint.on_best_path) && needed.every((word) => words.get(checkpoint).includes(word)));
    }
    const search = h("div", null, text);
    search.style.flex = "1 1 13rem";
    const tools = h("div.tools", null, search, runs.length > 1 && run, state, h("label.check", null, path, "Path to the best"));
    tools.style.marginBottom = "0.6rem";
    section("checkpoints", "Checkpoints", "Select a checkpoint to see its whole manifest.", h("div.card.flow", null, tools, made));
  }

  // -- a manifest ----------------------------------------------------------------------------------------------------

  const panel = document.getElementById("panel");
  let cameFrom = null;
  function manifestOf(checkpoint) {
    const [version, config, info] = data.manifests[data.checkpoints.indexOf(checkpoint)];
    const parts = Object.fromEntries(Object.entries(checkpoint.parts).map(([name, { where, ...part }]) => [name, part]));
    return {
      version, kind: "checkpoint", run: checkpoint.run, step: checkpoint.step, created: checkpoint.created, parent: checkpoint.parent, parts,
      experiment: data.experiments[checkpoint.experiment], metrics: checkpoint.metrics, tags: checkpoint.tags, note: checkpoint.note, config: data.values[config],
      info: Object.fromEntries(info.map(([name, at]) => [name, data.values[at]])),
    };
  }
  function fields(value) {
    const list = h("dl.fields");
    for (const [name, item] of Object.entries(value)) {
      const isNest = item !== null && typeof item === "object" && Object.keys(item).length > 0;
      list.append(h("dt", null, foreign(name)));
      if (isNest) list.append(h("dd", null, ""), h("dd.nest", null, fields(item)));
      else if (byId.has(item)) list.append(h("dd", null, link(item)));
      else list.append(h("dd", null, typeof item === "string" ? foreign(item) : JSON.stringify(item)));
    }
    return list;
  }
  function openPanel(id, from) {
    const checkpoint = byId.get(id);
    if (!checkpoint) return;
    const manifest = manifestOf(checkpoint);
    const children = data.checkpoints.filter((other) => other.parent === id);
    const session = checkpoint.session === null ? null : data.sessions[checkpoint.session];
    const parts = table([
      { name: "Part", cell: ([name]) => name },
      { name: "Plain", css: ".num", cell: ([, part]) => size(part.bytes) },
      { name: "Stored", css: ".num", cell: ([, part]) => size(part.stored_bytes) },
      { name: "Where", cell: ([, part]) => part.where },
      { name: "Policy", cell: ([name]) => (checkpoint.keep === null ? "–" : checkpoint.keep.includes(name) ? "keeps" : "drops") },
    ], Object.entries(checkpoint.parts), { caption: "Parts", first: 1e6 });
    const close = h("button", { type: "button", autofocus: true, onclick: () => panel.close() }, "Close");
    panel.replaceChildren();
    add(panel, [
      h("div.panelhead", null,
        h("div", null,
          h("h2", { id: "panel-title" }, `Step ${count(checkpoint.step)} of ${checkpoint.run}`),
          h("div", null, checkpoint.id === data.best ? h("span.badge.gold", null, "the best") : checkpoint.best_of_experiment && h("span.badge", null, "the best of its experiment"), " ", pill(checkpoint.availability)),
          h("p.whole", null, checkpoint.id)),
        close),
      h("div.panelbody", null,
        h("h3", null, "Quality"),
        fields({ score: checkpoint.score, ...checkpoint.metrics }),
        (checkpoint.tags.length > 0 || checkpoint.note) && [h("h3", null, "Tags and note"), h("p.words", null, checkpoint.tags.map((tag) => [h("span.badge", null, foreign(tag)), " "]), foreign(checkpoint.note))],
        h("h3", null, "Lineage"),
        h("dl.fields", null,
          h("dt", null, "created"), h("dd", null, time(checkpoint.created)),
          h("dt", null, "parent"), h("dd", null, checkpoint.parent ? link(checkpoint.parent) : "none"),
          h("dt", null, "resumed by"), h("dd", null, children.length ? children.slice(0, 20).map((other) => [link(other.id), " "]) : "none", children.length > 20 && `and ${children.length - 20} more`),
          session && [h("dt", null, "session"), h("dd", null, `${checkpoint.session + 1}, started ${printable(session.started).slice(0, 16).replace("T", " ")}`)]),
        h("h3", null, "Retention"),
        h("p.words", null, checkpoint.keep === null ? "unknown: " + data.retention.problem : checkpoint.keep.length ? `kept as ${checkpoint.kept_as}: ${checkpoint.reasons.join(", ")}` : `not kept: ${checkpoint.reasons.join(", ")}`),
        h("h3", null, "Parts"), parts,
        h("h3", null, "Experiment"), fields(manifest.experiment),
        h("h3", null, "Config"), fields(manifest.config),
        h("h3", null, "Info"), fields(manifest.info),
        h("h3", null, "Manifest"),
        h("details", null, h("summary", null, "All fields, as JSON"), h("pre", { id: "manifest-json" }, ...JSON.stringify(manifest, null, 2).split("\n").flatMap((text) => [text, h("br")])))),
    ]);
    panel.querySelector(".tablefoot")?.remove();
    if (!panel.open) {
      cameFrom = from ?? document.activeElement;
      panel.showModal();
    }
    panel.scrollTop = 0;
    close.focus();
  }
  panel.addEventListener("click", (event) => event.target === panel && panel.close());
  panel.addEventListener("close", () => (cameFrom?.focus(), (cameFrom = null)));

  // -- sessions -------------------------------------------------------------------------------------------------------

  function rejections(choice) {
    const more = choice.rejected_count - choice.rejected.length;
    return h("details", null,
      h("summary", null, `${plural(choice.rejected_count || choice.rejected.length, "checkpoint")} passed over`),
      h("ul", null, choice.rejected.map((rejected) => h("li.words", null, link(rejected.id), " ", foreign(rejected.reasons.join("; ")))), more > 0 && h("li.soft", null, `and ${count(more)} more`)));
  }
  function sessionCard(session, i) {
    const choice = session.resolution;
    const before = data.sessions[i - 1];
    const keys = before ? [...new Set([...Object.keys(session.environment), ...Object.keys(before.environment)])] : [];
    const text = (value) => (value === undefined ? "absent" : typeof value === "string" ? value : JSON.stringify(value));
    const changed = keys.filter((name) => name !== "git_commit" && JSON.stringify(session.environment[name]) !== JSON.stringify(before.environment[name]));
    const done = session.start_step !== null && session.final_step !== null ? session.final_step - session.start_step : null;
    const isGood = ["session-iters", "max-iters", "target-loss"].includes(session.stopped);
    return h("article.session", { "aria-label": `Session ${i + 1}` },
      h("div", null,
        h("h3", null, `Session ${i + 1}`),
        h("p.small", null, session.run),
        h("p.soft.small", null, printable(session.started).slice(0, 16).replace("T", " "), " UTC"),
        h("span.badge" + (isGood ? "" : ".warn"), null, session.stopped === null ? "no summary" : foreign(session.stopped))),
      h("div", null,
        terms([
          ["Steps", done === null ? "–" : `${count(session.start_step)} → ${count(session.final_step)}`],
          ["Validation loss", `${session.start_loss === null ? "" : number(session.start_loss) + " → "}${number(session.final_loss)}`],
          ["Best loss", number(session.best_loss)],
          ["Tokens/s", count(session.tokens_per_second)],
          ["Trained for", span(session.seconds)],
          ["Checkpoints", count(session.checkpoints.length)],
          session.connection_density !== null && ["Connected", percent(session.connection_density)],
        ].filter(Boolean)),
        h("div.notes", null,
          h("p.words", null, session.resumed_from ? ["Resumed from ", link(session.resumed_from), choice?.want && [" (asked for ", foreign(choice.want.slice(0, 64)), ")"], session.weights_only && ": weights only, the optimizer started fresh"] : ["Started from scratch", session.fresh && [": ", foreign(session.fresh)]]),
          choice?.instead_of && h("p", null, "Not from the best, ", link(choice.instead_of), ": this session was trained from there before, so it continued at its end"),
          choice?.differences.map((what) => h("p.words", null, "Differs: ", foreign(what))),
          changed.map((name) => h("p.words", null, "Unlike the session before: ", foreign(name), " ", foreign(text(before.environment[name])), " → ", foreign(text(session.environment[name])))),
          session.skipped.map((what) => h("p.words", null, "Skipped: ", foreign(what))),
          choice?.damaged.map((what) => h("p.words", null, "Damaged: ", foreign(what))),
          choice && (choice.rejected_count > 0 || choice.rejected.length > 0) && rejections(choice))));
  }
  function sessionsSection() {
    if (!data.sessions.length) return;
    const newest = data.sessions.map((session, i) => [session, i]).reverse();
    const list = h("div");
    let listed = 0;
    const more = h("button", { type: "button", onclick: () => show(50) }, "Show older ones");
    function show(many) {
      list.append(...newest.slice(listed, listed + many).map(([session, i]) => sessionCard(session, i)));
      listed += many;
      more.hidden = listed >= newest.length;
    }
    show(8);
    section("sessions", "Sessions", `${plural(data.sessions.length, "session")}, newest first.`, h("div.card.flow", null, list, h("div.tablefoot", null, more)));
  }

  // -- what is kept, and what it takes ----------------------------------------------------------------------------------

  function stack(parts, label) {
    const total = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
    return h("div.stack", { role: "img", "aria-label": label }, parts.map(([css, value]) => {
      const bar = h(`span.${css}`);
      bar.style.width = `${(100 * value) / total}%`;
      bar.hidden = value <= 0;
      return bar;
    }));
  }
  function retentionSection() {
    const { problem, policy, counts, elsewhere } = data.retention;
    const limit = policy.max_size === null ? "" : `, up to ${size(policy.max_size)}`;
    const rule = `Kept of each experiment: the best ${policy.keep}, the newest ${policy.keep_latest}, pins; in full the best and the newest ${policy.keep_optimizer}${limit}.`;
    if (problem) {
      section("retention", "Retention", rule, h("p.notice.warn", { role: "status" }, h("b", null, "What is kept is unknown: "), foreign(problem)));
      return;
    }
    const states = ["full", "weights-only", "history"];
    const kept = data.checkpoints.filter((checkpoint) => checkpoint.keep?.length);
    const gone = data.checkpoints.filter((checkpoint) => checkpoint.keep && !checkpoint.keep.length);
    const columns = [
      { name: "Checkpoint", cell: (checkpoint) => link(checkpoint.id) },
      { name: "Run", css: ".run.phone", sort: (checkpoint) => checkpoint.run, cell: (checkpoint) => checkpoint.run },
      { name: "Step", css: ".num", sort: (checkpoint) => checkpoint.step, cell: (checkpoint) => count(checkpoint.step) },
      { name: "Kept as", css: ".kept", sort: (checkpoint) => checkpoint.kept_as, cell: (checkpoint) => pill(checkpoint.kept_as) },
      { name: "Here now", css: ".phone", sort: (checkpoint) => checkpoint.availability, cell: (checkpoint) => pill(checkpoint.availability) },
      { name: "Why", css: ".why", cell: (checkpoint) => foreign(checkpoint.reasons.join(", ")) },
    ];
    const gc = data.store.gc;
    section("retention", "Retention", rule,
      h("div.card.flow", null,
        stack(states.map((name) => [name, counts[name] ?? 0]), states.map((name) => `${counts[name] ?? 0} ${name}`).join(", ")),
        h("div.counts", null,
          states.map((name) => h("div", null, h(`span.swatch.${name}`), h("b", null, count(counts[name] ?? 0)), name)),
          h("div.soft", null, gc.problem ? foreign(gc.problem) : gc.objects ? `castore gc would free ${size(gc.bytes)}` : "nothing to collect"),
          elsewhere > 0 && h("div.soft", null, `${count(elsewhere)} more in other branches`)),
        kept.length > 0 && h("h3", { class: "spaced" }, "Kept"),
        kept.length > 0 && table(columns, kept, { caption: "Kept checkpoints", first: 15 }),
        gone.length > 0 && h("details", null, h("summary", null, `${plural(gone.length, "checkpoint")} without kept data`), table(columns, gone, { caption: "Checkpoints as history", first: 25 }))));
  }
  function storeSection() {
    const store = data.store, total = store.total;
    const bar = (usage) => stack([["stored", usage.stored], ["compression", usage.saved_by_compression], ["sharing", usage.saved_by_sharing]], `${size(usage.stored)} stored of ${size(usage.raw)}`);
    const share = total.raw ? 1 - total.stored / total.raw : 0;
    const grid = (name, all) => [
      h("h3", { class: "spaced" }, name),
      h("div.usage", null, Object.entries(all).map(([group, usage]) => h("div", null, h("span.words", null, group), bar(usage), h("span.num", null, `${size(usage.stored)} of ${size(usage.raw)}`)))),
    ];
    const folders = Object.entries(store.folders).filter(([, folder]) => folder.files);
    section("store", "Store", total.raw > 0 && `${size(total.stored)} hold ${size(total.raw)} of plain copies: ${(100 * share).toFixed(0)} % saved.`,
      total.raw === 0 && h("p.notice", null, "None of the data is here: it may be in a remote, or in the cache of a CI system."),
      total.raw > 0 && h("div.card", null,
        bar(total),
        h("div.counts", null,
          h("div", null, h("span.swatch.stored"), h("b", null, size(total.stored)), "stored"),
          h("div", null, h("span.swatch.compression"), h("b", null, size(total.saved_by_compression)), "saved by compression"),
          h("div", null, h("span.swatch.sharing"), h("b", null, size(total.saved_by_sharing)), "saved by sharing")),
        grid("By part", store.by_part), Object.keys(store.by_run).length > 1 && grid("By run", store.by_run)),
      (store.unneeded > 0 || folders.length > 0) && h("p.soft.small", { class: "soft small spaced" },
        [store.unneeded > 0 && `${size(store.unneeded)} that no manifest here needs`, ...folders.map(([name, folder]) => `${name}/: ${plural(folder.files, "file")}, ${size(folder.bytes)}`)].filter(Boolean).join("; ")));
  }
  function environmentSection() {
    const { differences, same } = data.environment;
    if (!differences.length && !Object.keys(same).length) return;
    const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
    const who = (sessions) => (sessions.length > 6 ? plural(sessions.length, "session") : `session${sessions.length === 1 ? "" : "s"} ${sessions.map((i) => i + 1).join(", ")}`);
    const values = (difference) => {
      const item = ({ value, sessions }) => h("li.words", null, foreign(text(value)), " ", h("span.soft", null, who(sessions)));
      const list = h("ul", null, difference.values.slice(0, 4).map(item));
      return difference.values.length <= 4 ? list : [list, h("details", null, h("summary", null, `${plural(difference.values.length - 4, "more value")}`), h("ul", null, difference.values.slice(4).map(item)))];
    };
    section("environment", "Environment", differences.length ? "What differs between sessions." : "The same in all sessions.",
      h("div.card.flow", null,
        differences.length > 0 && h("dl.fields.environment", null, differences.map((difference) => [h("dt", null, foreign(difference.key)), h("dd", null, values(difference))])),
        Object.keys(same).length > 0 && h("details", { open: !differences.length }, h("summary", null, `${plural(Object.keys(same).length, "fact")} the same in all sessions`), fields(same))));
  }

  // -- the whole ------------------------------------------------------------------------------------------------------

  function overview() {
    const best = byId.get(data.best), newest = data.checkpoints[0], next = data.next;
    const runs = new Set(data.checkpoints.map((checkpoint) => checkpoint.run)).size;
    const tokens = data.sessions.reduce((sum, session) => sum + (session.tokens ?? 0), 0);
    main.append(h("div.title", null,
      h("h1", null, foreign(data.name || "castore")),
      h("p.soft", null, `${data.run ? `Run ${data.run}: ` : ""}${plural(data.checkpoints.length, "checkpoint")}${data.run ? "" : ` of ${plural(runs, "run")}`}, ${plural(data.sessions.length, "session")}. Made ${time(data.made)}.`)));
    const saved = data.store.total.raw ? Math.round(100 * (1 - data.store.total.stored / data.store.total.raw)) : 0;
    const fact = (name, value, ...more) => h("div", null, h("dt", null, name), h("dd", null, value, h("div.more", null, more)));
    main.append(h("dl.facts", null,
      best.metrics.val_loss !== undefined && fact("Best validation loss", number(best.metrics.val_loss), link(best.id), h("br"), `step ${count(best.step)} of ${best.run}`),
      best.score !== null && fact("Best score", number(best.score), data.experiments.length > 1 ? `in the newest of ${data.experiments.length} experiments` : "from 0 to 1, higher is better"),
      fact("Newest checkpoint", `${count(newest.step)}`, "step of ", newest.run, h("br"), time(newest.created)),
      fact("Next session from step", next ? count(next.step) : "–", next ? ["resumes ", link(next.id), h("br"), next.availability === "full" ? "in full" : next.availability] : "has no data to resume from"),
      tokens > 0 && fact("Tokens trained", tokens >= 1e6 ? `${(tokens / 1e6).toFixed(1)} M` : count(tokens), plural(data.sessions.length, "session")),
      fact("Stored", size(data.store.total.stored), saved > 0 ? `${saved} % saved of ${size(data.store.total.raw)}` : data.store.total.raw ? "of all runs" : "none of the data is here")));
    if (!next && data.passed_over.length) {
      main.append(h("div.notice.warn", null, h("b", null, "A session that resumes from the best has nothing to resume. "), h("details", null, h("summary", null, `${plural(data.passed_over.length, "checkpoint")} passed over`), h("ul", null, data.passed_over.slice(0, 20).map((rejected) => h("li.words", null, link(rejected.id), " ", foreign(rejected.reasons.join("; "))))))));
    }
  }
  function problems() {
    if (!data.broken.length) return;
    main.append(h("div.notice.warn", { role: "status" }, h("b", null, `${plural(data.broken.length, "file")} could not be read`),
      h("ul", null, data.broken.slice(0, 10).map((file) => h("li.words", null, h("code", null, foreign(file.path)), ": ", foreign(file.reason)))), data.broken.length > 10 && `and ${count(data.broken.length - 10)} more: castore doctor lists them`));
  }
  function themeButton() {
    const root = document.documentElement, button = document.getElementById("theme");
    const names = ["auto", "light", "dark"];
    let chosen = "auto";
    try {
      chosen = names.find((name) => name === localStorage.getItem("castore-theme")) ?? "auto";
    } catch {} // a browser may refuse to store anything for a local file
    const apply = () => {
      chosen === "auto" ? root.removeAttribute("data-theme") : root.setAttribute("data-theme", chosen);
      button.textContent = `Theme: ${chosen}`;
    };
    button.addEventListener("click", () => {
      chosen = names[(names.indexOf(chosen) + 1) % 3];
      try {
        localStorage.setItem("castore-theme", chosen);
      } catch {}
      apply();
    });
    apply();
  }

  document.title = printable(`${data.name || "castore"}: castore report`);
  document.body.append(live);
  themeButton();
  main.replaceChildren();
  if (data.checkpoints.length) {
    overview();
    problems();
    qualitySection();
    lineageSection();
    settingsSection();
    checkpointsSection();
    sessionsSection();
    retentionSection();
    storeSection();
    environmentSection();
  } else {
    main.append(h("div.empty", null,
      h("h1", null, data.run ? `No checkpoint of run ${data.run} yet` : "No checkpoint yet"),
      h("p", null, "A report shows how training goes, what was resumed from what, and what is kept. This makes the first checkpoint:"),
      h("pre", null, `castore train${data.run ? ` --run ${data.run}` : ""}`)));
    problems();
  }
  const words = h("p", null, data.stamp ? "Made by castore report --serve. It follows what is saved." : "Made by castore report. This file is complete in itself: it loads nothing.");
  document.getElementById("foot").append(words);
  if (data.stamp) {
    const follow = setInterval(async () => {
      try {
        const now = await (await fetch("/stamp", { cache: "no-store" })).text();
        if (now !== data.stamp && !panel.open) location.reload();
      } catch {
        clearInterval(follow);
        words.textContent = "castore report --serve has ended: this page stays as it is.";
      }
    }, 2000);
  }
  addEventListener("beforeprint", () => chartsDrawn.forEach((chart) => chart.draw()));
  addEventListener("scroll", hideTip, { passive: true });
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
