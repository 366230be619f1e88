// The panel: what the kernel sends, what the page answers, and an honest word on how fresh it is.
// Every message stands on its own, so that a lost one is healed by the next. Both sides beat: the
// page believes nothing after three missed beats, and the kernel stops for pages that are silent.

const BEAT_MS = 2000;

class Panel {
  constructor(model, el) {
    this.model = model;
    this.view = Math.random().toString(36).slice(2, 10);
    this.clicks = 0;
    this.cards = new Map();
    this.order = [];
    this.state = null;
    this.tickState = null;
    this.heard = null; // performance.now() of the last tick
    this.opened = performance.now();
    this.cursor = null;
    this.visible = false;
    this.away = null; // since when nobody has seen the panel, s; until the next look at the news
    this.skew = 0; // kernel's clock minus this page's, s
    this.build(el);
    this.receive = (message, buffers) => this.onMessage(message, buffers);
    model.on("msg:custom", this.receive);
    this.stopTheme = watchTheme(this.node, () => this.redraw());
    this.sizes = new ResizeObserver(() => this.redraw());
    this.sizes.observe(this.node);
    // What lies above the queue pushes its rows about.
    this.shifts = new ResizeObserver(() => this.queue.moved());
    for (const above of [this.banner, this.grid]) this.shifts.observe(above);
    this.sight = new IntersectionObserver((seen) => this.onSight(seen[seen.length - 1].isIntersecting));
    this.sight.observe(this.node);
    this.onPage = () => this.look();
    document.addEventListener("visibilitychange", this.onPage);
    this.timer = setInterval(() => this.look(), 500);
    this.beat = setInterval(() => { if (this.visible) this.send({ t: "beat" }); }, BEAT_MS);
  }

  build(el) {
    this.pill = h("span", { class: "gsq-pill" });
    this.news = h("span", { class: "gsq-news", role: "status", hidden: "" });
    this.source = h("span", { class: "gsq-dim gsq-ellipsis" });
    this.banner = h("p", { class: "gsq-banner", hidden: "" });
    this.grid = h("div", { class: "gsq-grid" });
    this.note = h("p", { class: "gsq-say", role: "status", "aria-live": "polite" });
    this.queue = new QueueTable((verb, job, value) => this.act(verb, job, value), (text) => this.say(text));
    // The notebook's own shortcuts (d d, arrows, Enter) must not fire from inside the panel.
    this.node = h("div", { class: "gsq", role: "region", "aria-label": "GPU panel",
      "data-lm-suppress-shortcuts": "true" },
      h("div", { class: "gsq-in" },
        h("header", { class: "gsq-top" }, h("h3", { text: "GPUs" }), this.pill, this.news, this.source),
        this.banner, this.grid, this.queue.node, this.note));
    this.queue.node.hidden = true;
    this.node.addEventListener("pointerenter", () => this.showNews([]));
    el.append(this.node);
    this.show();
  }

  send(message) { this.model.send({ ...message, v: this.view }); }

  act(verb, job, value) {
    this.clicks += 1;
    const click = `${this.view}-${this.clicks}`;
    this.send({ t: "do", c: click, verb, id: job ? job.id : null, sweep: Boolean(job && job.sweep), value });
    return click;
  }

  say(text, bad = false) {
    setText(this.note, text);
    this.note.classList.toggle("gsq-bad", bad);
    clearTimeout(this.saying);
    this.saying = setTimeout(() => setText(this.note, ""), bad ? 15000 : 6000);
  }

  now() { return Date.now() / 1000 + this.skew; }

  onMessage(message, buffers) {
    if (message.t === "tick") this.onTick(message, buffers[0]);
    else if (message.t === "past") this.onPast(message, buffers[0]);
    else if (message.t === "state") this.onState(message);
  }

  onTick(tick, buffer) {
    this.skew = tick.now - Date.now() / 1000;
    this.heard = performance.now();
    this.tickState = tick;
    for (const [click, good, text] of tick.answers) {
      if (this.queue.answered(click) && text) this.say(text, !good);
    }
    const missed = !this.state || tick.rev !== this.state.rev || tick.lay !== this.state.lay;
    if (missed) {
      // The state of this tick travels just before it; twice without it means that it was lost.
      this.misses = (this.misses || 0) + 1;
      if (this.misses > 1) this.hello();
    } else {
      this.misses = 0;
      this.addPoints(tick, buffer);
    }
    this.queue.tick(this.now());
    this.show();
    this.redraw();
  }

  onPast(past, buffer) {
    if (!this.state || past.lay !== this.state.lay) return;
    this.addPoints(past, buffer);
    this.redraw();
  }

  // counts[i] points of GPU i follow each other, FLOATS little-endian numbers each.
  addPoints(message, buffer) {
    if (!buffer) return;
    const view = new DataView(buffer.buffer || buffer, buffer.byteOffset || 0, buffer.byteLength);
    let at = 0;
    message.counts.forEach((count, i) => {
      const points = [];
      for (let n = 0; n < count; n += 1) {
        const point = [];
        for (let k = 0; k < FLOATS; k += 1, at += 4) point.push(view.getFloat32(at, true));
        point[0] += message.base;
        points.push(point);
      }
      const card = this.cards.get(this.order[i]);
      if (card) { card.add(points); card.trim(this.now()); }
    });
  }

  onState(state) {
    this.state = state;
    // A reading that failed names no GPU; the cards stay, dimmed, with what was last known.
    if (state.gpus.length || !state.problem) this.layOut(state.gpus);
    this.order.forEach((key, i) => { this.cards.get(key).spans = state.spans.filter((s) => s.gpu === i); });
    this.queue.node.hidden = false;
    this.queue.update(state, this.now());
    if (this.away && this.visible) this.showNews(state.spans.filter((span) => span.end !== null && span.end > this.away));
    setText(this.source, state.absent ? "" : (this.alike || "") + state.source);
    this.source.title = this.source.textContent;
    this.show();
    this.redraw();
  }

  layOut(gpus) {
    const keys = gpus.map((gpu) => gpu.key);
    for (const gpu of gpus) {
      if (!this.cards.has(gpu.key)) {
        this.cards.set(gpu.key, new Card((card, cursor) => this.moveCursor(card, cursor)));
      }
      this.cards.get(gpu.key).setMeta(gpu);
    }
    for (const key of [...this.cards.keys()]) if (!keys.includes(key)) this.cards.delete(key);
    if (keys.join() !== this.order.join()) {
      this.order = keys;
      this.grid.replaceChildren(...keys.map((key) => this.cards.get(key).node));
      this.sizes.disconnect();
      this.sizes.observe(this.node);
      for (const card of this.cards.values()) this.sizes.observe(card.plot);
    }
    const models = new Set(gpus.map((gpu) => gpu.name));
    const many = keys.length > 4;
    this.grid.classList.toggle("gsq-many", many);
    this.grid.classList.toggle("gsq-alike", many && models.size === 1);
    this.alike = many && models.size === 1 ? `${keys.length} × ${[...models][0]} · ` : "";
  }

  // What has ended since nobody could see the panel; gone when the pointer comes.
  showNews(spans) {
    const ended = new Map(spans.map((span) => [span.id, span.state]));
    const bad = [...ended.values()].filter((state) => state !== "completed").length;
    if (!ended.size) this.away = null;
    setText(this.news, ended.size ? `${ended.size} ended meanwhile${bad ? `, ${bad} not well` : ""}` : "");
    this.news.hidden = !ended.size;
  }

  moveCursor(card, cursor) {
    this.cursor = cursor;
    this.cursorCard = card;
    this.redraw();
  }

  redraw() {
    if (this.drawing || !this.node) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      const palette = colours(this.node);
      const now = this.edge();
      const windowS = this.windowS(now);
      for (const card of this.cards.values()) {
        card.showNumbers(this.fresh());
        card.draw(now, this.cursor, this.tickState ? this.tickState.every : 1, palette, windowS);
        card.showTip(card === this.cursorCard ? this.cursor : null, now);
      }
    });
  }

  // All cards span the same time, and no more of it than is known.
  windowS(now) {
    const known = now - Math.min(now, ...[...this.cards.values()].map((card) => card.oldest(now)));
    return WINDOWS_S.find((seconds) => known <= seconds) || KEPT_S;
  }

  // The right edge of the plots: now while news comes in, the last news after that.
  edge() {
    if (this.heard === null) return this.now();
    return this.now() - (this.stale() ? (performance.now() - this.heard) / 1000 : 0);
  }

  patience() { return 3000 * Math.max(1, this.tickState ? this.tickState.every : 1) + 500; }

  stale() { return this.heard !== null && performance.now() - this.heard > this.patience(); }

  // Numbers are shown as current only when the kernel is heard and its reading is neither old nor failed.
  fresh() {
    const tick = this.tickState;
    return Boolean(tick) && !this.stale() && !tick.problem && !this.oldReading(tick);
  }

  oldReading(tick) { return tick.age !== null && tick.age > tick.limit; }

  situation() {
    const tick = this.tickState;
    if (this.heard === null) {
      const late = performance.now() - this.opened > 3 * BEAT_MS;
      return late
        ? ["stale", "no answer", "The kernel does not answer. While a cell runs that is normal on older kernels; " +
           "after a restart, run this cell again."]
        : ["wait", "connecting", ""];
    }
    if (this.stale()) {
      return ["stale", "stale", `No news from the kernel since ${clockTime(this.edge())} ` +
        `(${span((performance.now() - this.heard) / 1000)} ago). What is shown is from then. ` +
        "If the kernel was restarted, run this cell again."];
    }
    if (tick.problem && this.state && this.state.absent) {
      return ["wait", "no GPU", `${tick.problem}. Jobs wait until a GPU can be read; the queue works.`];
    }
    if (tick.problem) return ["bad", "not readable", `The GPUs cannot be read: ${tick.problem}`];
    if (this.state && !this.state.gpus.length) return ["wait", "no reading", this.state.source];
    if (this.oldReading(tick)) {
      return ["stale", "old reading", `The last reading of the GPUs is ${span(tick.age)} old: ` +
        "the driver does not answer. Nothing new starts on old readings."];
    }
    return ["live", "live", ""];
  }

  show() {
    const [kind, word, text] = this.situation();
    const click = this.queue.overdue();
    if (this.shown !== kind + word) {
      const sign = { live: "live", wait: "pending", stale: "warn", bad: "failed" }[kind];
      this.pill.replaceChildren(icon(sign), h("span", { text: word }));
      this.pill.className = `gsq-pill gsq-pill-${kind}`;
      this.node.dataset.kind = kind;
      this.node.classList.toggle("gsq-faded", kind === "stale" || kind === "bad");
      this.shown = kind + word;
    }
    setText(this.banner, text);
    this.banner.hidden = !text;
    this.banner.dataset.kind = kind;
    if (click) {
      const what = click.key === null ? click.verb : `${click.verb} of ${/^\d/.test(click.key) ? `job ${click.key}` : "a sweep"}`;
      this.say(`The click (${what}) waits: the kernel is busy and takes it when the running cell ends.`);
    }
    this.queue.setDeaf(kind === "stale" && word !== "old reading");
  }

  // The picture that is saved for when the kernel is gone stands below; while this lives, it hides.
  hidePicture(hidden) {
    const own = `.gsq-still[data-panel="${CSS.escape(this.model.get("picture") || "")}"]`;
    for (const still of document.querySelectorAll(own)) {
      const output = still.closest(".jp-OutputArea-child") || still;
      output.style.display = hidden ? "none" : "";
    }
  }

  onSight(inView) { this.inView = inView; this.look(); }

  // Runs twice a second: whether anybody can see the panel, and whether its news is still news.
  look() {
    this.hidePicture(true);
    const visible = Boolean(this.inView) && document.visibilityState === "visible";
    if (visible !== this.visible) {
      this.visible = visible;
      if (visible) this.wake();
      else {
        this.away = this.away || this.now();
        this.send({ t: "hide" });
      }
    }
    if (!visible) return;
    if (this.heard === null && performance.now() - (this.asked || 0) > BEAT_MS) this.hello();
    const stale = this.stale();
    if (stale || this.queue.overdue() || this.heard === null || this.wasStale !== stale) {
      this.show();
      if (this.wasStale !== stale) this.redraw();
    }
    this.wasStale = stale;
  }

  wake() {
    // Nothing came while nobody looked: that silence is no sign of a dead kernel.
    if (this.heard !== null) this.heard = performance.now();
    this.opened = performance.now();
    this.hello();
  }

  hello() {
    if (this.asked && performance.now() - this.asked < 900) return;
    this.asked = performance.now();
    this.send({ t: "hello" });
  }

  close() {
    this.send({ t: "bye" });
    this.hidePicture(false);
    clearInterval(this.timer);
    clearInterval(this.beat);
    clearTimeout(this.saying);
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.model.off("msg:custom", this.receive);
    this.stopTheme();
    this.sizes.disconnect();
    this.shifts.disconnect();
    this.sight.disconnect();
    document.removeEventListener("visibilitychange", this.onPage);
    this.node.remove();
    this.node = null;
  }
}

export default {
  render({ model, el }) {
    const panel = new Panel(model, el);
    return () => panel.close();
  },
};
