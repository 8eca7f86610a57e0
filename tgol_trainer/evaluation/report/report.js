"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("rows").textContent);
  const images = JSON.parse(find("images").textContent);
  find("images").textContent = "";
  const { models, medium, scores, rows } = data;
  const page = 48;
  let shown = [];
  let drawn = 0;
  let current = -1;

  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  const options = (id, values) => values.forEach((text, value) => find(id)?.append(make("option", { value, textContent: text })));
  const number = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());
  const adapter = () => Number(find("adapter")?.value ?? 0) + 1;
  const score = () => Number(find("score").value);
  const value = (row, model, k = score()) => rows[row].values[model][k];
  const change = (row, model = adapter(), k = score()) => {
    const [before, after] = [value(row, 0, k), value(row, model, k)];
    return before === null || after === null ? null : after - before;
  };
  const signed = (amount) => (amount === null ? "–" : (amount > 0 ? "+" : "") + number(amount));
  const tone = (amount) => (amount > 0 ? "good" : amount < 0 ? "bad" : "");
  const source = (text) => `data:image/${text.startsWith("iVBOR") ? "png" : "webp"};base64,${text}`;

  const image = (row, model, large) => {
    const text = (large && images.previews[row]?.[model]) || images.thumbnails[row]?.[model];
    if (!text) return make("span", { className: "absent", textContent: images.thumbnails[row] ? `no ${medium}` : "not in this file" });
    const node = make("img", { alt: `${models[model]}: ${rows[row].prompt}, ${medium} ${rows[row].number + 1}`, loading: "lazy", decoding: "async", draggable: false });
    // Images of a few pixels are shown as they are, not blurred.
    node.addEventListener("load", () => node.classList.toggle("small", node.naturalWidth < 100));
    node.src = source(text);
    return node;
  };

  const card = (place) => {
    const row = shown[place];
    const entries = models.map((name, model) => {
      const amount = model ? change(row, model) : null;
      const open = make("button", { type: "button", "aria-label": `Enlarge: ${name}, ${rows[row].prompt}` }, image(row, model, false));
      open.addEventListener("click", () => enlarge(place));
      return make("div", { className: model && model === adapter() && models.length > 2 ? "model chosen" : "model" },
        make("span", { className: "name", title: name, textContent: name }), open,
        make("span", { textContent: number(value(row, model)) }),
        make("span", { className: `change ${tone(amount)}`, textContent: model ? signed(amount) : "" }));
    });
    const text = make("p", { title: rows[row].prompt, textContent: rows[row].prompt });
    return make("article", {}, text, make("div", { className: "models" }, ...entries));
  };

  const more = () => {
    const until = Math.min(drawn + page, shown.length);
    const fragment = document.createDocumentFragment();
    for (; drawn < until; drawn += 1) fragment.append(card(drawn));
    find("cards").append(fragment);
    find("more").hidden = drawn >= shown.length;
  };

  const arrange = () => {
    const wanted = find("search").value.trim().toLowerCase();
    const category = find("category")?.value ?? "";
    const order = find("order").value;
    shown = rows.map((_, row) => row).filter((row) =>
      (!category || data.categories[rows[row].category] === category) && (!wanted || rows[row].prompt.toLowerCase().includes(wanted)));
    if (order !== "prompt") {
      const sign = order === "worst" ? 1 : -1;
      const key = new Map(shown.map((row) => [row, change(row)]));
      // Pairs without a score come last in either order; equal changes keep the order of the prompts.
      shown.sort((a, b) => {
        const [one, two] = [key.get(a), key.get(b)];
        if (one === null || two === null) return (one === null) - (two === null);
        return sign * (one - two);
      });
    }
    drawn = 0;
    find("cards").replaceChildren();
    find("count").textContent = `${shown.length} of ${rows.length} pairs`;
    more();
  };

  const enlarge = (place) => {
    current = place;
    const row = shown[place];
    find("position").textContent = `${place + 1} of ${shown.length}`;
    find("viewer-prompt").textContent = rows[row].prompt;
    find("viewer-images").replaceChildren(...models.map((name, model) => make("figure", {}, image(row, model, true), make("figcaption", { textContent: name }))));
    const head = make("tr", {}, make("th", { scope: "col", textContent: "Score" }), ...models.map((name) => make("th", { scope: "col", textContent: name })));
    const lines = scores.map((name, k) => make("tr", {}, make("th", { scope: "row", textContent: name }), ...models.map((_, model) => {
      const amount = model ? change(row, model, k) : null;
      return make("td", { className: tone(amount), textContent: number(value(row, model, k)) + (model && amount !== null ? ` (${signed(amount)})` : "") });
    })));
    find("viewer-scores").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
    find("previous").disabled = place === 0;
    find("next").disabled = place === shown.length - 1;
    if (!find("viewer").open) find("viewer").showModal();
  };
  const step = (by) => {
    const place = current + by;
    if (place < 0 || place >= shown.length) return;
    while (place >= drawn) more();
    enlarge(place);
  };

  options("adapter", models.slice(1));
  options("score", scores);
  for (const name of data.categories) find("category")?.append(make("option", { value: name, textContent: name }));
  find("score").value = String(data.first_score);
  // Keeps space for images before they are decoded, so that nothing jumps; the policy allows a script to set this.
  find("cards").style.setProperty("--ratio", String(data.ratio));
  find("cards").className = models.length > 3 ? "many" : models.length > 2 ? "three" : "two";
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["adapter", "score", "order", "category"]) find(id)?.addEventListener("change", arrange);
  find("search").addEventListener("input", arrange);
  find("more").addEventListener("click", more);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("close").addEventListener("click", () => find("viewer").close());
  find("viewer").addEventListener("click", (event) => event.target === find("viewer") && find("viewer").close());
  find("viewer").addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  find("viewer").addEventListener("close", () => find("cards").children[current]?.querySelector("button")?.focus());
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more(), { rootMargin: "600px" }).observe(find("more"));
  arrange();
})();
