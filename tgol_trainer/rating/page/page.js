"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const make = (name, attributes = {}, ...children) => {
    const node = Object.assign(document.createElement(name), attributes);
    node.append(...children);
    return node;
  };
  const narrow = matchMedia("(max-width:600px)");
  // Per kind: answer, label, what it means, keys.
  const choices = {
    ratings: [1, 2, 3, 4, 5].map((n) => [n, String(n), { 1: "worst", 5: "best" }[n] ?? "", [String(n)]]),
    thumbs: [
      ["down", "Bad", "thumb down", ["ArrowDown", "-", "n"]],
      ["up", "Good", "thumb up", ["ArrowUp", "+", "y"]],
    ],
    pairs: [
      ["first", "Left", "is better", ["ArrowLeft", "1"]],
      ["tie", "Tie", "no difference", ["0", "t"]],
      ["second", "Right", "is better", ["ArrowRight", "2"]],
    ],
  };
  const hints = {
    ratings: "Keys: 1–5 rate",
    thumbs: "Keys: ↑ good, ↓ bad",
    pairs: "Keys: ← → choose, T tie",
  };
  const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const short = { up: "+", down: "−", first: "1", second: "2", tie: "=", skip: "–" };
  const views = ["start", "rate", "end"];
  let [rater, kind, medium, grouped, commands] = ["", "ratings", "image", false, []];
  const noun = () => (medium === "video" ? "video" : "picture");
  let [tasks, answers, past, current, busy] = [[], {}, [], -1, false];
  let before = null; // the answer that was taken back, to show

  const show = (view) => views.forEach((name) => (find(name).hidden = name !== view));
  const problem = (text) => {
    find("problem").hidden = !text;
    find("problem").textContent = text ?? "";
  };
  const done = () => tasks.filter((task) => task.id in answers).length;
  const next = (from) => {
    for (let step = 1; step <= tasks.length; step += 1) {
      const place = (from + step) % tasks.length;
      if (!(tasks[place].id in answers)) return place;
    }
    return -1;
  };

  const width = (shown) => shown.videoWidth ?? shown.naturalWidth;
  const height = (shown) => shown.videoHeight ?? shown.naturalHeight;
  const ready = (shown, action) => shown.addEventListener(medium === "video" ? "loadedmetadata" : "load", action);
  const picture = (id, label, still = false) => {
    const shown =
      medium === "video"
        ? make("video", { muted: true, loop: true, playsInline: true, autoplay: !still, preload: still ? "metadata" : "auto", ariaLabel: label })
        : make("img", { alt: label, draggable: false, decoding: "async" });
    // Pictures of a few pixels are shown as they are, not blurred.
    ready(shown, () => shown.classList.toggle("small", width(shown) < 100));
    shown.addEventListener("error", () => {
      // A browser may lack the codec: the server can make another file of it.
      if (medium === "video" && !shown.src.endsWith("as=webm")) shown.src = `image/${id}?as=webm`;
      else shown.replaceWith(make("span", { textContent: `This ${noun()} cannot be read. Skip it.` }));
    });
    shown.src = `image/${id}`;
    return shown;
  };

  const sides = () => (narrow.matches ? ["Upper", "Lower"] : ["Left", "Right"]);
  const drawChoices = () => {
    const given = answers[tasks[current]?.id] ?? before;
    find("choices").replaceChildren(
      ...choices[kind].map(([answer, label, meaning, keys]) => {
        const name = kind === "pairs" && answer !== "tie" ? sides()[answer === "first" ? 0 : 1] : label;
        const button = make("button", { type: "button", className: given === answer ? "given" : "" }, name);
        if (meaning) button.append(make("small", { textContent: meaning }));
        button.setAttribute("aria-keyshortcuts", keys.join(" "));
        button.dataset.answer = answer;
        button.addEventListener("click", () => rate(answer));
        return button;
      }),
    );
    find("keys").textContent = `${hints[kind]}, S skip, U undo, Z zoom`;
  };

  const drawStrip = () => {
    const prompt = tasks[current].prompt;
    const together = grouped ? tasks.filter((task) => task.prompt === prompt) : [];
    find("strip").hidden = kind === "pairs" || together.length < 2;
    if (find("strip").hidden) return;
    const thumbs = together.map((task, number) => {
      const image = picture(task.images[0], `${noun()} ${number + 1} of this prompt`, true);
      image.loading = "lazy";
      const thumb = make("button", { type: "button", className: "thumb" }, image);
      const answer = answers[task.id];
      if (answer !== undefined) thumb.append(make("b", { textContent: short[answer] ?? answer }));
      if (task === tasks[current]) thumb.setAttribute("aria-current", "true");
      thumb.addEventListener("click", () => go(tasks.indexOf(task)));
      return thumb;
    });
    find("strip").replaceChildren(...thumbs);
    find("strip").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  };

  const draw = () => {
    const task = tasks[current];
    find("bar").max = tasks.length;
    find("bar").value = done();
    find("count").textContent = `${done()} of ${tasks.length}`;
    find("rater").textContent = rater;
    find("prompt").textContent = task.prompt;
    find("undo").disabled = !past.length && current === 0;
    const labels = task.images.length === 2 ? sides().map((side) => `${side.toLowerCase()} ${noun()}`) : [`${noun()} to rate`];
    find("pictures").replaceChildren(
      ...task.images.map((id, side) => {
        const button = make("button", { type: "button", className: "picture", title: "Enlarge (Z)" }, picture(id, labels[side]));
        button.addEventListener("click", () => zoom(id, labels[side]));
        return button;
      }),
    );
    drawChoices();
    drawStrip();
    let place = current;
    for (let ahead = 0; ahead < 3; ahead += 1) {
      place = next(place);
      if (place < 0) break;
      if (medium === "image") tasks[place].images.forEach((id) => (new Image().src = `image/${id}`));
    }
  };

  const go = (place, taken = null) => {
    before = taken;
    current = place;
    problem("");
    if (place < 0) return finish();
    show("rate");
    draw();
  };

  const send = async (task, answer) => {
    const options = { method: "POST", headers: { "Content-Type": "application/json" } };
    const reply = await fetch("answer", { ...options, body: JSON.stringify({ rater, task: task.id, answer }) });
    const said = await reply.json().catch(() => ({}));
    if (!reply.ok || !said.saved) throw new Error(said.error ?? `the server answered ${reply.status}`);
  };
  const save = async (task, answer) => {
    if (busy) return false;
    busy = true;
    try {
      await send(task, answer);
      return true;
    } catch (error) {
      problem(`Not saved: ${error.message}. Is the command still running? Then try again.`);
      return false;
    } finally {
      busy = false;
    }
  };

  const rate = async (answer) => {
    const place = current;
    const task = tasks[place];
    document.querySelector(`#choices [data-answer="${answer}"]`)?.classList.add("given");
    if (!(await save(task, answer))) return drawChoices();
    answers[task.id] = answer;
    past.push(place);
    return go(next(place));
  };
  const undo = async () => {
    const last = past.length ? past[past.length - 1] : tasks.findLastIndex((task, place) => place < current && task.id in answers);
    if (last < 0) return;
    const taken = answers[tasks[last].id] ?? null;
    if (!(await save(tasks[last], null))) return;
    past.pop();
    delete answers[tasks[last].id];
    go(last, taken);
  };

  const zoom = (id, label) => {
    const dialog = find("zoom");
    const large = picture(id, label);
    large.id = "large";
    ready(large, () => {
      const fit = Math.min(innerWidth / width(large), innerHeight / height(large));
      large.style.width = `${Math.round(width(large) * Math.max(1, fit * (fit < 1 ? 1 : 0.98)))}px`;
      dialog.scrollTo((dialog.scrollWidth - innerWidth) / 2, (dialog.scrollHeight - innerHeight) / 2);
    });
    dialog.replaceChildren(large);
    dialog.showModal();
  };
  find("zoom").addEventListener("click", () => find("zoom").close());
  find("zoom").addEventListener("close", () => find("zoom").replaceChildren());

  const finish = () => {
    const skipped = Object.values(answers).filter((answer) => answer === "skip").length;
    const left = tasks.length - done();
    find("end-title").textContent = left ? "So far" : "All done";
    const counts = [`${counted(done() - skipped, kind === "pairs" ? "pair" : noun())} rated`, `${skipped} skipped`, ...(left ? [`${left} left`] : [])];
    find("summary").textContent = `${counts.join(", ")}. Each rating is saved already. Next, in a terminal:`;
    find("next").replaceChildren(
      ...commands.map((text) => {
        const copy = make("button", { type: "button", textContent: "Copy" });
        copy.addEventListener("click", async () => {
          try {
            await navigator.clipboard.writeText(text);
            copy.textContent = "Copied";
          } catch {
            // Only this machine and https have a clipboard: on a phone the text is marked, to be copied by hand.
            getSelection().selectAllChildren(copy.previousElementSibling);
            copy.textContent = "Marked";
          }
        });
        // Options are not broken at their hyphens.
        const parts = text.split(/ (?=--)/).flatMap((part, place) => [place ? " " : "", make("span", { textContent: part })]);
        return make("div", { className: "command" }, make("pre", {}, ...parts), copy);
      }),
    );
    find("model").hidden = !commands.some((text) => text.includes(" MODEL "));
    find("back").hidden = !left;
    find("again").hidden = !skipped;
    show("end");
  };
  find("finish").addEventListener("click", finish);
  find("back").addEventListener("click", () => go(next(current)));
  find("again").addEventListener("click", () => {
    const place = tasks.findIndex((task) => answers[task.id] === "skip");
    tasks.filter((task) => answers[task.id] === "skip").forEach((task) => delete answers[task.id]);
    go(place);
  });
  find("undo").addEventListener("click", undo);
  find("skip").addEventListener("click", () => rate("skip"));
  narrow.addEventListener("change", () => find("rate").hidden || draw());

  document.addEventListener("keydown", (event) => {
    if (find("rate").hidden || event.altKey || event.metaKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (find("zoom").open) {
      if (key !== "z") return;
      event.preventDefault();
      find("zoom").close();
      return;
    }
    if (event.ctrlKey && key !== "z") return;
    const choice = choices[kind].find(([, , , keys]) => keys.includes(key));
    const action = choice ? () => rate(choice[0]) : { u: undo, Backspace: undo, s: () => rate("skip"), z: event.ctrlKey ? undo : () => zoom(tasks[current].images[0], noun()) }[key];
    if (!action || event.repeat) return;
    event.preventDefault();
    action();
  });

  const begin = async (name) => {
    const reply = await fetch(`tasks?rater=${encodeURIComponent(name)}`);
    const found = await reply.json();
    if (!reply.ok) throw new Error(found.error);
    ({ kind, medium, by_prompt: grouped, commands, tasks, answers } = found);
    rater = name.trim().split(/\s+/).join(" ");
    past = [];
    document.body.classList.toggle("two", kind === "pairs");
    localStorage.setItem("rater", rater);
    go(next(-1));
  };
  find("start").addEventListener("submit", (event) => {
    event.preventDefault();
    begin(find("name").value).catch(refused);
  });
  find("about").textContent = "Say how good each picture is, as a picture of its prompt and for your taste.";
  const known = new URLSearchParams(location.search).get("rater");
  find("name").value = known ?? localStorage.getItem("rater") ?? "";
  const ask = () => {
    show("start");
    find("name").focus();
  };
  const refused = (error) => {
    find("about").textContent = error.message;
    ask();
  };
  if (known) begin(known).catch(refused);
  else ask();
})();
