// Puts output areas of ours in the place of what an earlier kernel has left under its cells.

const SEEK_MS = 500;
const GIVE_UP = 10; // tries; then the area stands under the cell that loaded us

class Place {
  constructor(model, uid) {
    this.model = model;
    this.uid = uid;
    this.node = document.createElement("div");
    this.node.className = "gpusched-onward";
    this.head = this.node.appendChild(document.createElement("div"));
    this.tries = 0;
    this.drawn = false;
  }

  /** The badge that the cell was given by the kernel that sent it off, wherever it stands. */
  badge() {
    const found = document.querySelectorAll(`.gpusched-of-${CSS.escape(this.uid)}`);
    return [...found].find((one) => !one.closest(".gpusched-onward"));
  }

  async update(cell) {
    if (this.head.innerHTML !== cell.badge) this.head.innerHTML = cell.badge;
    if (!this.drawn) {
      this.drawn = true;
      const manager = this.model.widget_manager;
      const view = await manager.create_view(await manager.get_model(cell.area));
      this.node.append(view.el);
      // A view that no output area has put up is told by us that it can be seen.
      const message = { type: "after-attach", isConflatable: false, conflate: () => false };
      view.luminoWidget?.processMessage(message);
    }
    this.seek();
  }

  /** Stand where the badge stands, instead of all that stands there. */
  seek() {
    if (this.area && !this.area.contains(this.old)) this.leave(); // the cell has been run again
    if (this.area?.isConnected) return;
    const badge = this.badge();
    const area = badge?.closest(".jp-OutputArea, .output_container, .output");
    if (area) {
      this.leave();
      [this.area, this.old] = [area, badge];
      area.append(this.node);
      area.classList.add("gpusched-taken");
    } else if (++this.tries > GIVE_UP && !this.node.isConnected && !this.gone) {
      home?.append(this.node);
    }
  }

  leave() {
    if (this.area) this.gone = !this.area.contains(this.old);
    this.node.remove();
    if (!this.area?.querySelector(":scope > .gpusched-onward")) {
      this.area?.classList.remove("gpusched-taken");
    }
    this.area = this.old = null;
  }
}

let home = null; // where the line of ours stands, and what has no cell in this page

/** Once for a page, however often and wherever we are shown. */
function initialize({ model }) {
  const places = new Map();

  function update() {
    const cells = model.get("cells");
    for (const [uid, place] of places) {
      if (!cells.some((cell) => cell.uid === uid)) {
        place.leave();
        places.delete(uid);
      }
    }
    for (const cell of cells) {
      if (!places.has(cell.uid)) places.set(cell.uid, new Place(model, cell.uid));
      places.get(cell.uid).update(cell);
    }
  }

  function seek() {
    for (const place of places.values()) place.seek();
    const there = [...places.values()].some((place) => place.area);
    if (home) {
      home.firstChild.textContent = there ? "gpuqueue: output goes on under its cells" : "";
    }
  }

  update();
  model.on("change:cells", update);
  const timer = setInterval(seek, SEEK_MS);
  return () => {
    clearInterval(timer);
    model.off("change:cells", update);
    for (const place of places.values()) place.leave();
  };
}

function render({ el }) {
  el.append(document.createElement("div"));
  home = el;
  return () => {
    if (home === el) home = null;
  };
}

export default { initialize, render };
