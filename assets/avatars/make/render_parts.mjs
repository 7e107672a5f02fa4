// Renders the parts of DiceBear's pixel-art style (CC0) to one atlas of 16x16 tiles, parts.png, with its index, parts.json.
//
//   cd assets/avatars/make && npm ci && node render_parts.mjs
//
// Tiles stand in the order of parts.json, 64 to a row. compose.py puts pictures together from them.
import { pathToFileURL } from "node:url";
import { writeFileSync } from "node:fs";
import { Resvg } from "@resvg/resvg-js";
import { create } from "@dicebear/pixel-art";

const lib = pathToFileURL(`${import.meta.dirname ?? new URL(".", import.meta.url).pathname}/node_modules/@dicebear/pixel-art/lib/`);
const components = await import(new URL("components/index.js", lib));

// Colours are DiceBear's own, those whose names no one would argue about.
const colors = {
  skin: ["ffdbac", "f5cfa0", "eac393", "e0b687", "cb9e6e", "b68655", "a26d3d", "8d5524"],
  hair: ["cab188", "603a14", "83623b", "28150a", "009bbd", "bd1700", "91cb15"],
  hat: ["2663a3", "3d8a6b", "cc6192", "a62116"],
  clothing: ["5bc0de", "428bca", "03396c", "88d8b0", "44c585", "00b159", "ff6f69", "d11141", "ae0001", "ffeead", "ffd969", "ffc425"],
  eyes: ["76778b", "5b7c8b", "588387", "876658"],
  glasses: ["4b4b4b", "191919", "43677d", "a04b5d"],
  mouth: ["d29985", "c98276", "e35d6a", "de0f0d"],
};
const colorOf = { clothing: "clothing", eyes: "eyes", glasses: "glasses", beard: "hair", mouth: "mouth", hair: "hair", hat: "hat" };

const skinPaths = create({ prng: { pick: (list) => list[0], bool: () => false }, options: { skinColor: ["@"] } }).body.match(/<path[^>]*>/g).slice(0, 2).join("");

const tiles = colors.skin.map((c) => ({ part: "skin", variant: "base", color: c, body: skinPaths.replace(/fill="#?@"/, `fill="#${c}"`) }));
for (const [part, color] of Object.entries(colorOf)) {
  for (const variant of Object.keys(components[part]).sort()) {
    for (const c of colors[color]) {
      const full = new Proxy({}, { get: () => `#${c}` });
      let body = components[part][variant]({}, full);
      // The art masks a beard by its own luminance, which hides dark ones: make the masks white.
      if (part === "beard") body = body.replace(/<mask[\s\S]*?<\/mask>/g, (m) => m.replace(/fill="[^"]*"/g, 'fill="#fff"'));
      tiles.push({ part, variant, color: c, body });
    }
  }
}

const columns = 64;
const rows = Math.ceil(tiles.length / columns);
const groups = tiles.map((t, i) => {
  const ids = t.body.replace(/(id="|url\(#)/g, `$1t${i}-`); // masks keep to their own tile
  return `<svg x="${(i % columns) * 16}" y="${Math.floor(i / columns) * 16}" width="16" height="16" viewBox="0 0 16 16">${ids}</svg>`;
});
const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${columns * 16}" height="${rows * 16}" viewBox="0 0 ${columns * 16} ${rows * 16}" fill="none" shape-rendering="crispEdges">${groups.join("")}</svg>`;
writeFileSync("parts.png", new Resvg(svg).render().asPng());
writeFileSync("parts.json", JSON.stringify(tiles.map(({ part, variant, color }) => [part, variant, color])) + "\n");
console.log(`${tiles.length} tiles`);
