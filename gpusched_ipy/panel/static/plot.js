// One GPU's card: its numbers, its picture of the last minutes, and who ran when.

const WINDOWS_S = [60, 120, 300, 600]; // what a picture may span: it grows with what is known
const FLOATS = 6; // a point: time, utilization, GiB used, °C, W, throttled
const PLOT_H = 92;
const LANE_H = 15;
const AXIS_H = 15;
const KEPT_S = WINDOWS_S[WINDOWS_S.length - 1];
const MAX_LANES = 4;
const GUTTER = 30; // left of the picture, for the scale

// `into` and `more` are sorted by time; a point that is sent again replaces the first one.
function mergePoints(into, more) {
  for (const point of more) {
    let at = into.length;
    while (at > 0 && into[at - 1][0] > point[0] + 0.005) at -= 1;
    const same = at > 0 && Math.abs(into[at - 1][0] - point[0]) <= 0.005;
    if (same) into[at - 1] = point;
    else into.splice(at, 0, point);
  }
}

function nearestPoint(points, t, reach) {
  let best = null;
  for (const point of points) {
    if (!best || Math.abs(point[0] - t) < Math.abs(best[0] - t)) best = point;
  }
  return best && Math.abs(best[0] - t) <= reach ? best : null;
}

// Jobs that share a card lie above each other; what does not fit goes into the last lane.
function placeSpans(spans, now) {
  const ends = [];
  const placed = [];
  for (const job of [...spans].sort((a, b) => a.start - b.start || a.id - b.id)) {
    let lane = ends.findIndex((end) => end <= job.start + 0.05);
    if (lane < 0) lane = Math.min(ends.length, MAX_LANES - 1);
    ends[lane] = Math.max(ends[lane] || 0, job.end ?? now);
    placed.push({ ...job, lane });
  }
  return { placed, lanes: Math.max(1, ends.length) };
}

function colours(node) {
  const style = getComputedStyle(node);
  const read = (name) => style.getPropertyValue(`--gsq-${name}`).trim();
  return {
    fg: read("fg"), dim: read("dim"), line: read("line"), util: read("util"), mem: read("mem"),
    plot: read("plot"), bad: read("bad"), jobs: [0, 1, 2, 3, 4, 5].map((i) => read(`job${i}`)),
    font: style.fontFamily,
  };
}

class Card {
  constructor(onCursor) {
    this.points = [];
    this.spans = [];
    this.meta = null;
    this.windowS = WINDOWS_S[0];
    this.onCursor = onCursor;
    this.title = h("h4", { class: "gsq-gpu" });
    this.model = h("span", { class: "gsq-dim gsq-ellipsis" });
    this.heat = h("span", { class: "gsq-heat" });
    this.util = h("b");
    this.mem = h("b");
    this.memTotal = h("span", { class: "gsq-dim" });
    this.canvas = h("canvas", { tabindex: "0", role: "img" });
    this.tip = h("div", { class: "gsq-tip", "aria-hidden": "true" });
    this.who = h("ul", { class: "gsq-who", "aria-label": "who uses this GPU" });
    this.plot = h("div", { class: "gsq-plot" }, this.canvas, this.tip);
    this.node = h("section", { class: "gsq-card", role: "group" },
      h("header", {}, this.title, this.model, this.heat),
      h("div", { class: "gsq-values" },
        h("div", {}, h("i", { class: "gsq-key gsq-solid" }), this.util,
          h("span", { class: "gsq-dim", text: "utilization" })),
        h("div", {}, h("i", { class: "gsq-key gsq-dashed" }), this.mem, this.memTotal,
          h("span", { class: "gsq-dim gsq-word", text: "memory" }))),
      this.plot, this.who);
    this.canvas.addEventListener("pointermove", (e) => this.pointAt(e.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.onCursor(null, null));
    this.canvas.addEventListener("blur", () => this.onCursor(null, null));
    this.canvas.addEventListener("keydown", (e) => this.key(e));
  }

  pointAt(x) {
    const inside = Math.min(1, Math.max(0, (x - GUTTER) / (this.canvas.clientWidth - GUTTER)));
    this.onCursor(this, inside * this.windowS - this.windowS);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -100, End: 100 }[event.key];
    if (event.key === "Escape") this.onCursor(null, null);
    if (step === undefined) return;
    event.preventDefault();
    const to = (this.cursor ?? 0) + (step * this.windowS) / 100;
    this.onCursor(this, Math.min(0, Math.max(-this.windowS, to)));
  }

  setMeta(meta) {
    this.meta = meta;
    const place = meta.index === null ? "GPU" : `GPU ${meta.index}`;
    setText(this.title, place);
    setText(this.model, meta.name.replace(/^NVIDIA /, ""));
    this.model.title = `${meta.name} · ${meta.key}`;
    this.node.setAttribute("aria-label", `${place}, ${meta.name}`);
    this.node.classList.toggle("gsq-ill", meta.health !== "ok" && meta.health !== "asleep");
    const items = [];
    if (meta.note) items.push(h("li", { class: "gsq-note" }, icon("warn"), h("span", { text: meta.note })));
    for (const line of meta.who) {
      const text = h("span", { text: line.text });
      items.push(line.job ? h("li", { class: "gsq-ours" }, icon("running"), text) : h("li", {}, text));
    }
    this.who.replaceChildren(...items);
  }

  add(points) { mergePoints(this.points, points); }

  trim(now) {
    const first = this.points.findIndex((point) => point[0] >= now - KEPT_S - 5);
    if (first > 0) this.points.splice(0, first);
    if (first < 0) this.points.length = 0;
  }

  ratio(point) {
    return this.meta && this.meta.total ? point[2] / (this.meta.total / 2 ** 30) : NaN;
  }

  // Temperature and power are read less often than utilization: the last ones known of 10 s count.
  recent(place) {
    const last = this.points[this.points.length - 1];
    for (let i = this.points.length - 1; i >= 0 && last[0] - this.points[i][0] < 10; i -= 1) {
      if (known(this.points[i][place])) return this.points[i][place];
    }
    return NaN;
  }

  showNumbers(fresh) {
    const total = this.meta && this.meta.total ? this.meta.total / 2 ** 30 : NaN;
    const [util, mem, heat, power, slow] = [1, 2, 3, 4, 5].map((i) => (fresh ? this.recent(i) : NaN));
    setText(this.util, percent(util));
    setText(this.mem, gib(mem));
    setText(this.memTotal, known(total) ? `of ${wholeGib(total)}` : "");
    const parts = [known(heat) ? degrees(heat) : "", known(power) ? watts(power) : "",
      slow === 1 ? "throttled" : ""].filter(Boolean);
    setText(this.heat, parts.join(" · "));
    const label = `${this.title.textContent}, last ${Math.round(this.windowS / 60)} min. Now: utilization ${percent(util)}, ` +
      `memory ${gib(mem)} ${known(total) ? `of ${wholeGib(total)}` : "used"}` +
      `${parts.length ? `, ${parts.join(", ")}` : ""}. Arrow keys move through time.`;
    // A screen reader need not hear of every beat.
    if (!this.labelled || performance.now() - this.labelled > 10000) {
      this.canvas.setAttribute("aria-label", label.replaceAll(UNKNOWN, "unknown"));
      this.labelled = performance.now();
    }
  }

  // Since when something is known of this GPU.
  oldest(now) {
    const starts = this.spans.map((job) => Math.max(job.start, now - KEPT_S));
    return Math.min(now, this.points.length ? this.points[0][0] : now, ...starts);
  }

  draw(now, cursor, every, palette, windowS) {
    this.cursor = cursor;
    this.windowS = windowS;
    const { placed, lanes } = placeSpans(this.spans, now);
    const width = this.canvas.clientWidth;
    const height = PLOT_H + AXIS_H + lanes * LANE_H + 2;
    if (!width) return;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) ||
        this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      this.canvas.style.height = `${height}px`;
    }
    const ctx = this.canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    const x = (t) => GUTTER + ((t - now) / windowS + 1) * (width - GUTTER);
    const y = (ratio) => 4 + (1 - Math.min(1, Math.max(0, ratio))) * (PLOT_H - 6);
    this.drawGrid(ctx, width, y, palette);
    ctx.save();
    ctx.beginPath();
    ctx.rect(GUTTER, 0, width - GUTTER, height);
    ctx.clip();
    this.drawLine(ctx, (p) => this.ratio(p), x, y, every, palette.mem, [4, 3], 0.1);
    this.drawLine(ctx, (p) => p[1], x, y, every, palette.util, [], 0.22);
    for (const job of placed) this.drawSpan(ctx, job, x, now, width, palette);
    ctx.restore();
    this.drawCursor(ctx, cursor, now, x, y, width, height, palette);
  }

  drawGrid(ctx, width, y, palette) {
    ctx.fillStyle = palette.plot;
    ctx.fillRect(GUTTER, 0, width - GUTTER, PLOT_H);
    ctx.strokeStyle = palette.line;
    ctx.lineWidth = 1;
    ctx.setLineDash([]);
    ctx.font = `10px ${palette.font}`;
    ctx.fillStyle = palette.dim;
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    for (const ratio of [0, 0.5, 1]) {
      const at = Math.round(y(ratio)) + 0.5;
      ctx.beginPath();
      ctx.moveTo(GUTTER, at);
      ctx.lineTo(width, at);
      ctx.stroke();
      ctx.fillText(ratio ? `${ratio * 100}` : `0${NNBSP}%`, GUTTER - 5, Math.max(6, at));
    }
    ctx.textBaseline = "top";
    for (const share of width < 300 ? [1, 0.5, 0] : [1, 0.75, 0.5, 0.25, 0]) {
      const at = GUTTER + (width - GUTTER) * (1 - share);
      const ago = share * this.windowS;
      ctx.textAlign = share === 1 ? "left" : share === 0 ? "right" : "center";
      const size = ago < 90 ? `${ago}${NNBSP}s` : `${ago / 60}${NNBSP}min`;
      const text = share === 0 ? "now" : `\u2212${size}`;
      ctx.fillText(text, at, PLOT_H + 3);
    }
    ctx.textAlign = "left";
  }

  // A gap in the readings is a gap in the line; a reading on its own is a dot.
  drawLine(ctx, value, x, y, every, colour, dash, fill) {
    const gap = Math.max(5, 3 * every);
    let run = [];
    const flush = () => {
      if (run.length === 1) {
        ctx.fillStyle = colour;
        ctx.beginPath();
        ctx.arc(run[0][0], run[0][1], 1.5, 0, 7);
        ctx.fill();
      } else if (run.length) {
        strokeRun(ctx, run, colour, dash, fill, y(0), y(1));
      }
      run = [];
    };
    let before = null;
    for (const point of this.points) {
      const ratio = value(point);
      if (before !== null && point[0] - before > gap) flush();
      if (known(ratio)) run.push([x(point[0]), y(ratio)]);
      else flush();
      before = point[0];
    }
    flush();
  }

  drawSpan(ctx, job, x, now, width, palette) {
    const top = PLOT_H + AXIS_H + job.lane * LANE_H;
    const left = Math.max(GUTTER, x(job.start));
    const right = Math.min(width, x(job.end ?? now));
    const size = Math.max(2, right - left);
    const colour = palette.jobs[job.id % palette.jobs.length];
    const bad = ["failed", "timeout", "lost"].includes(job.state);
    ctx.globalAlpha = job.end === null ? 0.3 : 0.16;
    ctx.fillStyle = colour;
    ctx.fillRect(left, top, size, LANE_H - 2);
    ctx.globalAlpha = 1;
    ctx.fillRect(left, top, 2, LANE_H - 2);
    if (bad || job.state === "cancelled") hatch(ctx, left, top, size, bad ? palette.bad : palette.dim);
    ctx.fillStyle = palette.fg;
    ctx.font = `10px ${palette.font}`;
    ctx.textBaseline = "middle";
    const mark = bad ? "✕ " : job.state === "cancelled" ? "⊘ " : "";
    for (const text of [`${mark}#${job.id} ${job.name}`, `${mark}#${job.id}`, mark.trim()]) {
      if (ctx.measureText(text).width > size - 7) continue;
      ctx.fillText(text, left + 5, top + (LANE_H - 2) / 2 + 0.5);
      break;
    }
  }

  drawCursor(ctx, cursor, now, x, y, width, height, palette) {
    if (cursor === null) return;
    const at = x(now + cursor);
    ctx.strokeStyle = palette.dim;
    ctx.setLineDash([2, 2]);
    ctx.beginPath();
    ctx.moveTo(at, 0);
    ctx.lineTo(at, height);
    ctx.stroke();
    ctx.setLineDash([]);
    const point = nearestPoint(this.points, now + cursor, 8);
    if (!point) return;
    for (const [ratio, colour] of [[this.ratio(point), palette.mem], [point[1], palette.util]]) {
      if (!known(ratio)) continue;
      ctx.fillStyle = colour;
      ctx.beginPath();
      ctx.arc(x(point[0]), y(ratio), 3, 0, 7);
      ctx.fill();
    }
  }

  showTip(cursor, now) {
    if (cursor === null) {
      this.tip.classList.remove("gsq-shown");
      return;
    }
    const t = now + cursor;
    const point = nearestPoint(this.points, t, 8);
    const lines = [h("div", { class: "gsq-tip-time", text:
      `${clockTime(point ? point[0] : t)} · ${span(-cursor)} ago` })];
    const row = (key, value, line) => lines.push(h("div", {},
      h("i", { class: `gsq-key ${line}` }), h("span", { text: key }), h("b", { text: value })));
    if (point) {
      const ratio = this.ratio(point);
      row("utilization", percent(point[1]), "gsq-solid");
      row("memory", known(ratio) ? `${gib(point[2])} (${percent(ratio)})` : gib(point[2]), "gsq-dashed");
      if (known(point[3])) row("temperature", degrees(point[3]), "gsq-blank");
      const limit = this.meta.limit ? ` of ${watts(this.meta.limit)}` : "";
      if (known(point[4])) row("power", watts(point[4]) + limit, "gsq-blank");
    } else {
      lines.push(h("div", { text: "no reading" }));
    }
    for (const job of this.spans) {
      if (job.start <= t && t <= (job.end ?? now)) {
        lines.push(h("div", { class: "gsq-ours", text: `#${job.id} ${job.name} (${job.state})` }));
      }
    }
    this.tip.replaceChildren(...lines);
    this.tip.classList.add("gsq-shown");
    const width = this.canvas.clientWidth;
    const at = GUTTER + (cursor / this.windowS + 1) * (width - GUTTER);
    const own = this.tip.offsetWidth;
    this.tip.style.left = `${at + 12 + own > width ? Math.max(0, at - own - 12) : at + 12}px`;
  }
}

function strokeRun(ctx, run, colour, dash, fill, floor, ceiling) {
  const shade = ctx.createLinearGradient(0, ceiling, 0, floor);
  shade.addColorStop(0, colour);
  shade.addColorStop(1, `${colour}00`); // the colours are #rrggbb
  ctx.beginPath();
  ctx.moveTo(run[0][0], floor);
  for (const [px, py] of run) ctx.lineTo(px, py);
  ctx.lineTo(run[run.length - 1][0], floor);
  ctx.globalAlpha = fill;
  ctx.fillStyle = shade;
  ctx.fill();
  ctx.globalAlpha = 1;
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1.6;
  ctx.lineJoin = "round";
  ctx.setLineDash(dash);
  ctx.beginPath();
  run.forEach(([px, py], i) => (i ? ctx.lineTo(px, py) : ctx.moveTo(px, py)));
  ctx.stroke();
  ctx.setLineDash([]);
}

function hatch(ctx, left, top, size, colour) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, size, LANE_H - 2);
  ctx.clip();
  ctx.strokeStyle = colour;
  ctx.globalAlpha = 0.45;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let at = left - LANE_H; at < left + size; at += 5) {
    ctx.moveTo(at, top + LANE_H);
    ctx.lineTo(at + LANE_H, top);
  }
  ctx.stroke();
  ctx.restore();
}
