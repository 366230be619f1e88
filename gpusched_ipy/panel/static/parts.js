// Small parts that every piece of the panel uses: elements, icons, formats, the theme.
// Text that a job or a process controls only ever becomes textContent, never markup.

const NNBSP = "\u202f"; // between a number and its unit
const UNKNOWN = "\u2014";

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const ICONS = {
  live: "M8 4.5a3.5 3.5 0 1 1 0 7 3.5 3.5 0 1 1 0-7",
  running: "M5 3.2v9.6L13 8z",
  starting: "M8 2.5a5.5 5.5 0 1 1-5.5 5.5M8 5v3l2 1.5",
  pending: "M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 1 0 0-11M8 5v3.2l2.2 1.4",
  held: "M5.5 3.5v9M10.5 3.5v9",
  completed: "M3 8.5l3.5 3.5L13 4.5",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 1 0 0-11M4.2 11.8l7.6-7.6",
  timeout: "M4.5 2.5h7M4.5 13.5h7M5 2.5c0 3 6 5.5 6 11M11 2.5c0 3-6 5.5-6 11",
  lost: "M5.5 6a2.5 2.5 0 1 1 3.6 2.3C8.3 8.7 8 9.2 8 10M8 12.4v.2",
  up: "M8 13V3.5M4 7.2L8 3.2l4 4",
  down: "M8 3v9.5M4 8.8l4 4 4-4",
  hold: "M5.5 3.5v9M10.5 3.5v9",
  release: "M5 3.2v9.6L13 8z",
  cancel: "M4 4l8 8M12 4l-8 8",
  warn: "M8 2.5L14.2 13.5H1.8zM8 6.5v3.3M8 11.6v.2",
  previous: "M10 3.5L5.5 8l4.5 4.5",
  next: "M6 3.5L10.5 8 6 12.5",
  folded: "M6 3.5L10.5 8 6 12.5",
  unfolded: "M3.5 6L8 10.5 12.5 6",
};
const FILLED = new Set(["live", "running", "release"]);

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", FILLED.has(name) ? "gsq-icon gsq-filled" : "gsq-icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name] || ICONS.lost);
  svg.append(path);
  return svg;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const known = (value) => typeof value === "number" && !Number.isNaN(value);
const percent = (ratio) => (known(ratio) ? `${Math.round(ratio * 100)}${NNBSP}%` : UNKNOWN);
const gib = (value) =>
  known(value) ? `${value.toFixed(value >= 99.95 ? 0 : 1)}${NNBSP}GiB` : UNKNOWN;
const wholeGib = (value) =>
  Math.abs(value - Math.round(value)) < 0.05 ? `${Math.round(value)}${NNBSP}GiB` : gib(value);
const degrees = (value) => (known(value) ? `${Math.round(value)}${NNBSP}°C` : UNKNOWN);
const watts = (value) => (known(value) ? `${Math.round(value)}${NNBSP}W` : UNKNOWN);

function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s}${NNBSP}s`;
  if (s < 3600) return `${Math.floor(s / 60)}${NNBSP}min`;
  if (s < 86400) return `${Math.floor(s / 3600)}${NNBSP}h ${Math.floor((s % 3600) / 60)}${NNBSP}min`;
  return `${Math.floor(s / 86400)}${NNBSP}d ${Math.floor((s % 86400) / 3600)}${NNBSP}h`;
}

function clockTime(wall) {
  return new Date(wall * 1000).toLocaleTimeString([], { hourCycle: "h23" });
}

// Light or dark is what the page shows behind the panel, whatever front end it is.
function isDark(node) {
  for (let at = node; at; at = at.parentElement) {
    const parts = getComputedStyle(at).backgroundColor.match(/[\d.]+/g);
    if (parts && (parts.length < 4 || Number(parts[3]) > 0.5)) {
      const [r, g, b] = parts.map(Number);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b < 128;
    }
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function watchTheme(node, changed) {
  const apply = () => {
    const theme = isDark(node.parentElement || document.body) ? "dark" : "light";
    if (node.dataset.theme === theme) return;
    node.dataset.theme = theme;
    changed();
  };
  // A theme's stylesheet arrives after its attribute: look again a little later.
  const later = () => { apply(); setTimeout(apply, 300); };
  const observer = new MutationObserver(later);
  observer.observe(document.body, { attributes: true });
  observer.observe(document.documentElement, { attributes: true });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", later);
  later();
  return () => { observer.disconnect(); media.removeEventListener("change", later); };
}
