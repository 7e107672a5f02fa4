"use strict";

// Clicking a column's name, or Enter, sorts by it: best first, then worst first, then in the original order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const [first, second] = head.dataset.best === "high" ? ["descending", "ascending"] : ["ascending", "descending"];
      const now = head.getAttribute("aria-sort");
      const next = now === null ? first : now === first ? second : null;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      table.classList.toggle("sorted", next !== null);
      const key = row => row.cells[column].dataset.sort;
      const compare = (a, b) => {
        if (key(a) === undefined || key(b) === undefined) return (key(a) === undefined) - (key(b) === undefined);
        const order = key(a) - key(b) || key(a).localeCompare(key(b));
        return next === "ascending" ? order : -order;
      };
      body.append(...(next ? [...original].sort(compare) : original));
    });
  });
}

// The comparer shows one image of two strips, the right one over the left one up to the slider.
const section = document.getElementById("comparer");
if (section) {
  const strips = [...document.querySelectorAll(".strip")].map(strip => ({
    ...strip.dataset, images: [...strip.querySelectorAll("img")], pixels: strip.querySelector(".pixels") !== null,
  }));
  const [left, right] = section.querySelectorAll("select");
  const panes = [...section.querySelectorAll(".pane img")], tags = [...section.querySelectorAll(".tag")];
  const stage = section.querySelector(".stage"), slider = section.querySelector("input");
  const thumbs = section.querySelector(".thumbs"), caption = section.querySelector("blockquote");
  const prompts = [...document.querySelectorAll("#prompts li")].map(item => item.textContent);
  const name = strip => strip.model + (strip.steps === "0" ? "" : `, ${strip.steps} step${strip.steps === "1" ? "" : "s"}`);
  let picture = 0;

  const put = (shown, strip, index) => {
    shown.src = strip.images[index].src;
    shown.classList.toggle("pixels", strip.pixels);
  };
  const thumb = index => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(document.createElement("img"));
    button.firstChild.alt = `Prompt ${index + 1}`;
    button.addEventListener("click", () => { picture = index; show(); });
    return button;
  };
  const show = () => {
    const chosen = [left, right].map(select => strips[select.value]);
    const count = Math.min(...chosen.map(strip => strip.images.length));
    picture = Math.min(picture, count - 1);
    chosen.forEach((strip, side) => {
      put(panes[side], strip, picture);
      panes[side].alt = name(strip);
      tags[side].textContent = name(strip);
      tags[side].className = `tag dot ${strip.mark}`;
      tags[side].style.setProperty("--c", `var(--s${strip.colour})`);
    });
    stage.style.aspectRatio = chosen[0].ratio;
    while (thumbs.children.length < count) thumbs.append(thumb(thumbs.children.length));
    [...thumbs.children].forEach((button, index) => {
      button.hidden = index >= count;
      if (index === picture) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      if (index < count) put(button.firstChild, chosen[1], index);
    });
    caption.textContent = prompts[picture] ?? "";
  };
  for (const select of [left, right]) {
    const groups = new Map();
    strips.forEach((strip, index) => {
      if (!groups.has(strip.model)) {
        const group = document.createElement("optgroup");
        group.label = strip.model;
        groups.set(strip.model, group);
        select.append(group);
      }
      groups.get(strip.model).append(new Option(name(strip), index));
    });
    select.addEventListener("change", show);
  }
  const cut = () => stage.style.setProperty("--cut", `${slider.value}%`);
  slider.addEventListener("input", cut);
  section.querySelector(".swap").addEventListener("click", () => {
    [left.value, right.value] = [right.value, left.value];
    show();
  });
  // Clicking an image in the grids shows it on the right.
  strips.forEach((strip, index) => strip.images.forEach((image, at) => image.addEventListener("click", () => {
    picture = at;
    right.value = index;
    show();
    section.scrollIntoView({ block: "start" });
  })));
  left.value = section.dataset.left;
  right.value = section.dataset.right;
  cut();
  show();
  section.hidden = false;
  document.documentElement.classList.add("scripted");
}
