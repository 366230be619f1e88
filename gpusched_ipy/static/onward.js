// Writes what cells of an earlier kernel go on to show into the notebook, as outputs of these cells.

/** The cell of the notebook under which the badge of that job stands; none: not in this page. */
function cellOf(context, uid) {
  for (const cell of context?.model?.cells ?? []) {
    const outputs = cell.outputs;
    for (let at = 0; at < (outputs?.length ?? 0); at++) {
      if (String(outputs.get(at).data["text/html"] ?? "").includes(`gpusched-of-${uid}`)) {
        return cell;
      }
    }
  }
  return undefined;
}

function badgeOf(job) {
  const data = { "text/html": job.badge, "text/plain": job.text };
  return { output_type: "display_data", data, metadata: {} };
}

/** Make `outputs` those `wanted`, of which it has had `last` from us; what stays is not redrawn. */
function write(outputs, wanted, last) {
  if (!last || last.length !== outputs.length || wanted.length < last.length) {
    outputs.fromJSON(wanted);
    return;
  }
  wanted.forEach((output, at) => {
    if (at >= last.length) outputs.add(output);
    else if (JSON.stringify(output) !== last[at]) outputs.set(at, output);
  });
}

/** What has no cell here, or where the page tells of none: under the cell that loaded us. */
async function draw(model, cell, node) {
  node.append(document.createElement("div"));
  const manager = model.widget_manager;
  const view = await manager.create_view(await manager.get_model(cell.area));
  node.append(view.el);
  // A view that no output area has put up is told by us that it can be seen.
  view.luminoWidget?.processMessage({
    type: "after-attach",
    isConflatable: false,
    conflate: () => false,
  });
}

class Onward {
  constructor(model) {
    this.model = model;
    this.context = model.widget_manager.context; // in JupyterLab and Notebook: the document
    this.areas = new Map(); // by uid of the job
    this.cells = new Map(); // … the cell that it was found under
    this.strays = new Map(); // … the node of what has no cell here
    this.last = new Map(); // by cell, what we have written
    this.home = null; // where these stand
    this.again = false;
    this.writing = null;
  }

  /** Have the page show what there is now. */
  update() {
    this.again = true;
    this.writing ??= this.run().finally(() => (this.writing = null));
  }

  async run() {
    await this.context?.ready;
    while (this.again) {
      this.again = false;
      await this.once();
    }
  }

  async once() {
    const cells = this.model.get("cells");
    for (const cell of cells) {
      if (this.areas.has(cell.uid)) continue;
      const area = await this.model.widget_manager.get_model(cell.area);
      area.on("change:outputs", () => this.update());
      this.areas.set(cell.uid, area);
    }
    const together = new Map(); // the jobs of one cell: a sweep has many
    for (const cell of cells) {
      const place = cellOf(this.context, cell.uid);
      if (place) {
        this.cells.set(cell.uid, place);
        together.set(place, [...(together.get(place) ?? []), cell]);
      }
    }
    const written = [];
    for (const [place, jobs] of together) {
      const wanted = jobs.flatMap((job) => [
        badgeOf(job),
        ...this.areas.get(job.uid).get("outputs"),
      ]);
      write(place.outputs, wanted, this.last.get(place));
      this.last.set(place, wanted.map((output) => JSON.stringify(output)));
      written.push(...jobs.filter((job) => job.over).map((job) => job.uid));
    }
    this.tell("found", [...this.cells.keys()]);
    this.tell("written", written);
    await this.show(cells);
  }

  tell(name, uids) {
    if (uids.join() === this.model.get(name).join()) return;
    this.model.set(name, uids);
    this.model.save_changes();
  }

  /** What has no cell; one that was found once and has been run again or cleared wants none. */
  async show(cells) {
    const home = this.home;
    if (!home) return;
    for (const [uid, node] of this.strays) {
      if (!cells.some((cell) => cell.uid === uid)) node.remove();
    }
    for (const cell of cells) {
      if (this.cells.has(cell.uid)) continue;
      if (!this.strays.has(cell.uid)) {
        const node = document.createElement("div");
        node.className = "gpusched-onward";
        this.strays.set(cell.uid, node);
        await draw(this.model, cell, node);
      }
      const node = this.strays.get(cell.uid);
      node.firstChild.innerHTML = cell.badge;
      if (node.parentNode !== home) home.append(node);
    }
  }
}

let onward = null; // this script is loaded once for each widget

/** Once for a page, however often and wherever we are shown. */
function initialize({ model }) {
  onward = new Onward(model);
  const update = () => onward.update();
  model.on("change:cells", update);
  update();
  return () => model.off("change:cells", update);
}

function render({ el }) {
  onward.home = el;
  onward.update();
  return () => {
    if (onward.home === el) onward.home = null;
  };
}

export default { initialize, render };
