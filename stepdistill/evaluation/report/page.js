"use strict";

// Columns sort by a click on their name, or Enter: best first, then worst first, then as they were.
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

// The comparer shows one picture of two strips, the right one over the left one up to the slider.
const section = document.getElementById("comparer");
if (section) {
  const strips = [...document.querySelectorAll("img[data-model]")];
  const [left, right] = section.querySelectorAll("select");
  const panes = [...section.querySelectorAll(".pane")], tags = [...section.querySelectorAll(".tag")];
  const stage = section.querySelector(".stage"), slider = section.querySelector("input");
  const thumbs = section.querySelector(".thumbs"), caption = section.querySelector("blockquote");
  const prompts = [...document.querySelectorAll("#prompts li")].map(item => item.textContent);
  const name = image => image.dataset.model +
    (image.dataset.steps === "0" ? "" : `, ${image.dataset.steps} step${image.dataset.steps === "1" ? "" : "s"}`);
  let picture = 0;

  const crop = (shown, image, index) => {
    shown.src = image.src;
    shown.className = image.className;
    shown.style.width = `${100 * image.dataset.count}%`;
    shown.style.left = `${-100 * index}%`;
    shown.parentElement.style.aspectRatio = image.dataset.ratio;
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
    const count = Math.min(...chosen.map(image => image.dataset.count));
    picture = Math.min(picture, count - 1);
    chosen.forEach((image, side) => {
      crop(panes[side].firstElementChild, image, picture);
      panes[side].firstElementChild.alt = name(image);
      tags[side].textContent = name(image);
      tags[side].style.setProperty("--c", `var(--s${image.dataset.colour})`);
    });
    stage.style.aspectRatio = chosen[0].dataset.ratio;
    while (thumbs.children.length < count) thumbs.append(thumb(thumbs.children.length));
    [...thumbs.children].forEach((button, index) => {
      button.hidden = index >= count;
      if (index === picture) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      crop(button.firstChild, chosen[1], index);
    });
    caption.textContent = prompts[picture] ?? "";
  };
  for (const select of [left, right]) {
    const groups = new Map();
    strips.forEach((image, index) => {
      if (!groups.has(image.dataset.model)) {
        const group = document.createElement("optgroup");
        group.label = image.dataset.model;
        groups.set(image.dataset.model, group);
        select.append(group);
      }
      groups.get(image.dataset.model).append(new Option(name(image), index));
    });
    select.addEventListener("change", show);
  }
  const cut = () => stage.style.setProperty("--cut", `${slider.value}%`);
  slider.addEventListener("input", cut);
  section.querySelector(".swap").addEventListener("click", () => {
    [left.value, right.value] = [right.value, left.value];
    show();
  });
  // A picture of the grids, clicked, comes up on the right.
  strips.forEach((image, index) => image.addEventListener("click", event => {
    picture = Math.floor(event.offsetX / image.clientWidth * image.dataset.count);
    right.value = index;
    show();
    section.scrollIntoView({ block: "start" });
  }));
  left.value = section.dataset.left;
  right.value = section.dataset.right;
  cut();
  show();
  section.hidden = false;
  document.documentElement.classList.add("scripted");
}
