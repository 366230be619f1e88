// The queue: one row a job, its state in a word and a sign, and the buttons that steer it.

const LIVE = new Set(["pending", "starting", "running"]);

// What tells a row from all others: the number of its job, or its sweep.
const keyOf = (job) => job.key ?? String(job.id);

function stateOf(job) {
  if (job.cancel && LIVE.has(job.state)) return ["cancelled", "cancelling"];
  if (job.state === "pending") return job.held ? ["held", "held"] : ["pending", "waiting"];
  return [job.state, job.state];
}

function verbsOf(job) {
  const waiting = (job.sweep ? job.waits : job.state === "pending") && !job.cancel;
  const live = LIVE.has(job.state) && !job.cancel;
  return { up: waiting, down: waiting, hold: waiting && !job.held, release: waiting && job.held,
    cancel: live };
}

class Row {
  constructor(table, key) {
    this.table = table;
    this.key = key;
    this.cells = {};
    this.buttons = {};
    this.node = h("tr", { class: "gsq-row", role: "row" });
    for (const key of ["id", "name", "state", "priority", "owner", "reason", "since"]) {
      const cell = key === "name"
        ? h("th", { scope: "row", role: "rowheader", class: "gsq-c-name" })
        : h("td", { role: "cell", class: `gsq-c-${key}` });
      this.cells[key] = cell;
      this.node.append(cell);
    }
    this.fold = h("button", { type: "button", tabindex: "-1", class: "gsq-button gsq-fold", hidden: "",
      onclick: (e) => { if (!e.detail || this.table.aimed()) this.table.press(this.job, "fold"); } });
    this.number = h("span");
    this.cells.id.append(this.fold, this.number);
    this.reason = h("div", { class: "gsq-clamp" }); // two lines, then an ellipsis
    this.cells.reason.append(this.reason);
    const group = h("td", { role: "cell", class: "gsq-c-do" });
    for (const verb of ["up", "down", "hold", "release", "cancel"]) {
      const button = h("button", { type: "button", tabindex: "-1", class: `gsq-button gsq-do-${verb}`,
        "data-verb": verb, onclick: (e) => this.press(verb, e.detail > 0) }, icon(verb));
      this.buttons[verb] = button;
      group.append(button);
    }
    this.node.append(group);
  }

  update(job) {
    this.job = job;
    const [sign, word] = stateOf(job);
    if (this.sign !== sign + word) {
      this.cells.state.replaceChildren(
        h("span", { class: `gsq-state gsq-is-${sign}` }, icon(sign), h("span", { text: word })));
      this.sign = sign + word;
    }
    setText(this.number, job.label || `#${job.id}`);
    this.fold.hidden = !job.sweep;
    this.node.classList.toggle("gsq-member", Boolean(job.member));
    if (job.sweep && this.unfolded !== job.unfolded) {
      this.unfolded = job.unfolded;
      this.fold.replaceChildren(icon(job.unfolded ? "unfolded" : "folded"));
      this.fold.setAttribute("aria-expanded", String(job.unfolded));
      this.fold.title = job.unfolded ? "hide the jobs of the sweep" : "show the jobs of the sweep";
      this.fold.setAttribute("aria-label", this.fold.title);
    }
    setText(this.cells.name, job.name);
    this.cells.name.title = `${job.name} (${job.sweep ? "sweep" : job.kind})`;
    setText(this.cells.priority, String(job.priority));
    this.cells.priority.title = "priority: higher runs first";
    setText(this.cells.owner, job.owner.replace(/^notebook /, ""));
    this.cells.owner.title = job.owner;
    const why = [job.reason, job.expected && `starts ${job.expected}`].filter(Boolean).join(" · ");
    setText(this.reason, why);
    this.cells.reason.title = why;
    this.showButtons();
  }

  showButtons() {
    const allowed = verbsOf(this.job);
    const names = { up: "raise the priority of", down: "lower the priority of", hold: "hold",
      release: "release", cancel: this.armed ? "press again to cancel" : "cancel" };
    for (const [verb, button] of Object.entries(this.buttons)) {
      const busy = this.table.isWaiting(this.key, verb);
      const other = verb === "hold" ? "release" : verb === "release" ? "hold" : null;
      button.hidden = other !== null && !allowed[verb] && (allowed[other] || verb === "release");
      const off = !allowed[verb] || busy || this.table.deaf;
      button.setAttribute("aria-disabled", String(off));
      button.classList.toggle("gsq-busy", busy);
      button.setAttribute("aria-busy", String(busy));
      const label = `${names[verb]} ${this.who()} ${this.job.name}`;
      button.setAttribute("aria-label", label);
      button.title = `${label}${busy ? " (waits for the kernel)" : ""}`;
    }
    this.buttons.cancel.classList.toggle("gsq-armed", Boolean(this.armed));
  }

  who() { return this.job.sweep ? "the sweep" : `job ${this.job.id}`; }

  press(verb, pointed) {
    if (pointed && !this.table.aimed()) return;
    if (this.buttons[verb].getAttribute("aria-disabled") === "true") return;
    const heavy = this.job.state !== "pending" || this.job.sweep;
    if (verb === "cancel" && heavy && !this.armed) {
      this.armed = setTimeout(() => { this.armed = null; this.showButtons(); }, 4000);
      this.table.say(this.job.sweep ? "Press the cancel button of the sweep again to end all its jobs."
        : `Job ${this.job.id} is ${this.job.state}: press its cancel button again to end it.`);
      this.showButtons();
      return;
    }
    clearTimeout(this.armed);
    this.armed = null;
    this.table.press(this.job, verb);
  }

  tick(now) {
    setText(this.cells.since, this.job.since === null ? "" : span(now - this.job.since));
    if (this.job.since !== null) this.cells.since.title = `since ${clockTime(this.job.since)}`;
  }
}

class QueueTable {
  constructor(act, say) {
    this.act = act; // (verb, job or null, value) -> the click's number
    this.say = say;
    this.rows = new Map();
    this.waiting = new Map(); // click -> {key, verb, at}
    this.priorities = new Map(); // row -> the priority asked for and not yet shown
    this.deaf = false;
    this.offset = 0;
    const heads = [["id", "Job"], ["name", "Name"], ["state", "State"], ["priority", "Priority"],
      ["owner", "From"], ["reason", "Why it waits, when it starts · where it runs"], ["since", "Since"], ["do", "Actions"]];
    this.body = h("tbody", { role: "rowgroup" });
    this.count = h("span", { class: "gsq-count" });
    this.drain = h("button", { type: "button", class: "gsq-button gsq-wide gsq-drain",
      onclick: () => this.pressDrain() });
    this.range = h("span", { class: "gsq-dim" });
    this.back = this.pageButton("previous", -1);
    this.more = this.pageButton("next", 1);
    this.pager = h("div", { class: "gsq-pager", role: "group", "aria-label": "pages of the queue" },
      this.back, this.range, this.more);
    this.empty = h("p", { class: "gsq-empty gsq-dim" });
    this.table = h("table", { role: "table", "aria-label": "The queue: higher priority runs first" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...heads.map(([key, text]) =>
        h("th", { scope: "col", role: "columnheader", class: `gsq-c-${key}`, text })))),
      this.body);
    this.scroll = h("div", { class: "gsq-scroll" }, this.table);
    this.node = h("section", { class: "gsq-queue", "aria-label": "The queue" },
      h("header", {}, h("h4", { text: "Queue" }), this.count, this.drain),
      this.scroll, this.empty, this.pager);
    this.movedAt = -1; // when rows last moved on the screen …
    this.aimedAt = 0; // … and when the pointer last did
    const aim = () => { this.aimedAt = performance.now(); };
    this.body.addEventListener("pointermove", aim);
    this.body.addEventListener("pointerdown", (e) => { if (e.pointerType !== "mouse") aim(); });
    this.body.addEventListener("keydown", (e) => this.key(e));
    this.body.addEventListener("focusin", (e) => this.rove(e.target.closest("button")));
  }

  pageButton(name, step) {
    return h("button", { type: "button", class: "gsq-button", "aria-label": `${name} page`,
      title: `${name} page`, onclick: () => {
        const page = this.state.limit * step;
        this.act("page", null, Math.max(0, this.state.offset + page));
      } }, icon(name));
  }

  moved() { this.movedAt = performance.now(); }

  // A row that slid under a resting pointer was not the one that was meant.
  aimed() {
    if (this.movedAt <= this.aimedAt) return true;
    this.aimedAt = performance.now();
    this.say("The list has just moved under the pointer: look, and press again.");
    return false;
  }

  isWaiting(key, verb) {
    for (const click of this.waiting.values()) if (click.key === key && click.verb === verb) return true;
    return false;
  }

  press(job, verb) {
    const step = { up: 1, down: -1 }[verb], key = keyOf(job);
    if (step === undefined) {
      this.remember(this.act(verb, job, null), key, verb);
    } else {
      const from = this.priorities.get(key) ?? job.priority;
      const to = Math.min(1000, Math.max(-1000, from + step));
      this.priorities.set(key, to);
      this.remember(this.act("priority", job, to), key, verb);
    }
    this.rows.get(key)?.showButtons();
  }

  pressDrain() {
    if (this.drain.getAttribute("aria-disabled") === "true") return;
    const verb = this.state.drained ? "resume" : "drain";
    this.remember(this.act(verb, null, null), null, verb);
    this.showDrain();
  }

  remember(click, key, verb) { this.waiting.set(click, { key, verb, at: performance.now() }); }

  answered(click) {
    const asked = this.waiting.get(click);
    if (!asked) return false;
    this.waiting.delete(click);
    if (asked.key === null) this.showDrain();
    else {
      this.priorities.delete(asked.key);
      this.rows.get(asked.key)?.showButtons();
    }
    return true;
  }

  // The oldest click that has waited for longer than a healthy kernel takes.
  overdue() {
    for (const click of this.waiting.values()) {
      if (performance.now() - click.at > 1500) return click;
    }
    return null;
  }

  setDeaf(deaf) {
    if (this.deaf === deaf) return;
    this.deaf = deaf;
    for (const row of this.rows.values()) row.showButtons();
    if (this.state) this.showDrain();
  }

  update(state, now) {
    this.state = state;
    const focused = this.body.contains(document.activeElement) ? document.activeElement : null;
    const seen = new Set();
    state.jobs.forEach((job, place) => {
      const key = keyOf(job);
      seen.add(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = new Row(this, key)));
      row.update(job);
      row.tick(now);
      if (this.body.children[place] !== row.node) {
        this.body.insertBefore(row.node, this.body.children[place] || null);
        this.moved();
      }
    });
    for (const [key, row] of this.rows) {
      if (seen.has(key)) continue;
      row.node.remove();
      this.moved();
      this.rows.delete(key);
    }
    // Moving a row in the document takes its focus away: give it back.
    if (focused && focused.isConnected && document.activeElement !== focused) focused.focus();
    if (!this.body.querySelector('button[tabindex="0"]')) this.rove(this.body.querySelector("button:not([hidden])"));
    this.showCounts(state);
    this.showDrain();
  }

  showCounts(state) {
    const { running, waiting, held } = state.counts;
    const parts = [`${running} running`, `${waiting} waiting`];
    if (held) parts.push(`${held} held`);
    if (state.drained) parts.push("drained: nothing new starts");
    setText(this.count, parts.join(" · "));
    this.empty.hidden = state.total > 0;
    setText(this.empty, state.trouble || "Nothing is queued. A cell that begins with %%gpuqueue waits here for its GPU.");
    this.table.hidden = state.total === 0;
    this.pager.hidden = state.total <= state.limit && state.offset === 0;
    const last = state.offset + state.jobs.length;
    setText(this.range, `${Math.min(state.offset + 1, last)}–${last} of ${state.total}`);
    this.back.disabled = state.offset === 0;
    this.more.disabled = last >= state.total;
  }

  showDrain() {
    const verb = this.state.drained ? "resume" : "drain";
    const busy = this.isWaiting(null, verb);
    this.drain.classList.toggle("gsq-busy", busy);
    this.drain.classList.toggle("gsq-armed", this.state.drained);
    this.drain.setAttribute("aria-disabled", String(busy || this.deaf));
    this.drain.setAttribute("aria-busy", String(busy));
    setText(this.drain, this.state.drained ? "Resume" : "Drain");
    this.drain.title = this.state.drained
      ? "let pending jobs start again"
      : "start no new job; what runs goes on";
    this.node.classList.toggle("gsq-drained", this.state.drained);
  }

  tick(now) { for (const row of this.rows.values()) row.tick(now); }

  // One stop for the Tab key in the whole table; arrow keys move between its buttons.
  rove(button) {
    if (!button) return;
    const before = this.body.querySelector('button[tabindex="0"]');
    if (before) before.tabIndex = -1;
    button.tabIndex = 0;
  }

  key(event) {
    const button = event.target.closest("button");
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!button || !step) return;
    event.preventDefault();
    const row = button.closest("tr");
    const shown = (node) => [...node.querySelectorAll("button:not([hidden])")];
    const at = shown(row).indexOf(button);
    const rows = [...this.body.children];
    const next = rows[rows.indexOf(row) + step[0]];
    if (!next) return;
    const line = shown(next);
    line[Math.min(line.length - 1, Math.max(0, at + step[1]))].focus();
  }
}
