"use strict";
// Draws the pictures with their masks from the JSON in #data. Text goes through textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 12;
const COLOURS = 7;
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const state = { group: "sample", page: 0, open: null };

function element(name, attributes = {}, ...children) {
  const made = ["svg", "path", "image", "text", "rect"].includes(name)
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const images = () => data.groups[state.group].map((place) => data.images[place]);
const nameOf = (image) => image.uri.split("/").pop();
const passes = ([, , iou, stability]) =>
  iou >= Number($("iou").value) && (stability ?? 0) >= Number($("stability").value);

function picture(image) {
  const [width, height] = image.shown;
  const svg = element("svg", { class: "picture", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": image.uri });
  if (image.jpeg) {
    svg.append(element("image", { href: `data:image/jpeg;base64,${image.jpeg}`, width, height }));
  } else {
    svg.append(element("rect", { width, height, fill: "#333a44" }));
    svg.append(element("text", { x: width / 2, y: height / 2 }, "The picture is gone or changed"));
  }
  image.masks.forEach((mask, number) => {
    if (passes(mask)) svg.append(element("path", { class: `mask c${number % COLOURS}`, d: mask[0], "data-mask": number }));
  });
  return svg;
}

function drawGallery() {
  const all = images();
  const pages = Math.max(1, Math.ceil(all.length / PER_PAGE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const some = all.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
  let drawn = 0, known = 0;
  $("gallery").replaceChildren(...some.map((image, number) => {
    const shown = image.masks.filter(passes).length;
    drawn += shown;
    known += image.masks.length;
    const says = element("span", { class: "says", title: image.uri }, `${image.total} masks · ${nameOf(image)}`);
    const card = element("button", { class: "card", type: "button" }, picture(image), says);
    card.addEventListener("click", () => openViewer(state.page * PER_PAGE + number));
    return element("li", {}, card);
  }));
  $("drawn").textContent = all.length ? `${drawn} of ${known} masks on this page are drawn.` : "There are no such images.";
  $("page").textContent = `Page ${state.page + 1} of ${pages}`;
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page === pages - 1;
}

function openViewer(number) {
  const image = images()[number];
  if (!image) return;
  state.open = number;
  const svg = picture(image);
  const halo = element("path", { class: "halo" }), chosen = element("path", { class: "chosen" });
  svg.append(halo, chosen);
  const choose = (mask, button) => {
    for (const outline of [halo, chosen]) outline.setAttribute("d", mask ? mask[0] : "");
    for (const other of $("viewer-masks").querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    if (button) button.setAttribute("aria-current", "true");
  };
  const rows = image.masks.flatMap((mask, mark) => {
    if (!passes(mask)) return [];
    const [, area, iou, stability] = mask;
    const share = (100 * area) / (image.size[0] * image.size[1]);
    const colour = element("svg", { viewBox: "0 0 8 8", "aria-hidden": "true" },
      element("rect", { class: `c${mark % COLOURS}`, width: 8, height: 8 }));
    const button = element("button", { type: "button", "data-mask": mark }, colour,
      `IoU ${iou.toFixed(3)} · stability ${stability === null ? "none" : stability.toFixed(3)} · ${share.toPrecision(2)}%`);
    for (const event of ["focus", "mouseenter", "click"]) button.addEventListener(event, () => choose(mask, button));
    return [element("li", {}, button)];
  });
  svg.addEventListener("click", (event) => {
    const button = $("viewer-masks").querySelector(`[data-mask="${event.target.dataset.mask}"]`);
    if (button) button.focus();
  });
  $("viewer-title").textContent = nameOf(image);
  $("viewer-says").textContent = `${image.uri}, ${image.size[0]} × ${image.size[1]} pixels. ${rows.length} masks drawn of `
    + `${image.total}${image.missing ? `. ${image.missing}` : ""}. Largest first; choose one here or in the picture.`;
  $("viewer-picture").replaceChildren(svg);
  $("viewer-masks").replaceChildren(...rows);
  if (!$("viewer").open) $("viewer").showModal();
}

function turn(step) {
  state.page += step;
  drawGallery();
}

document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  if ($("viewer").open) openViewer(state.open + step);
  else turn(step);
});
$("viewer").addEventListener("close", () => {
  const page = Math.floor(state.open / PER_PAGE);
  if (page !== state.page) {
    state.page = page;
    drawGallery();
  }
  $("gallery").querySelectorAll(".card")[state.open % PER_PAGE]?.focus();
});
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
$("close").addEventListener("click", () => $("viewer").close());
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
for (const input of document.querySelectorAll("input[name=group]")) {
  input.addEventListener("change", () => { Object.assign(state, { group: input.value, page: 0 }); drawGallery(); });
}

// A slider runs over the scores that there are.
for (const [id, place] of [["iou", 2], ["stability", 3]]) {
  const scores = data.images.flatMap((image) => image.masks.map((mask) => mask[place] ?? 0));
  const low = Math.floor(100 * scores.reduce((a, b) => Math.min(a, b), 1)) / 100;
  const high = Math.ceil(100 * scores.reduce((a, b) => Math.max(a, b), low)) / 100;
  Object.assign($(id), { min: low, max: Math.max(high, low + 0.01), step: 0.005 });
  $(id).value = low;
  const tell = () => { $(`${id}-value`).textContent = Number($(id).value).toFixed(3); };
  $(id).addEventListener("input", () => { tell(); drawGallery(); });
  tell();
}
for (const [key, places] of Object.entries(data.groups)) $(`count-${key}`).textContent = places.length;
drawGallery();
