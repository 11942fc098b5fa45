// The review page. What is shown as decided is on the disk: a decision is sent, and shown when the
// service has answered.

const $ = (id) => document.getElementById(id);
const made = (name, className, text) => {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));

let state;
let photos = []; // by number
let current = 0;
let ended = false;

// ---------------------------------------------------------------- the service

async function ask(path, body) {
  let answer;
  try {
    answer = await fetch(path, body === undefined ? {} : {
      method: "POST", body: JSON.stringify(body), priority: "high", // pictures may wait
    });
  } catch {
    throw new Error("The service does not answer, so nothing more is kept. What was decided is: start the same command again.");
  }
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.detail ?? `The service answers ${answer.status}.`);
  return said;
}

let line = Promise.resolve(); // decisions are sent one after another, in the order of the keys
function change(path, body, then) {
  if (ended) return line;
  line = line.then(async () => {
    try {
      const changed = await ask(path, body);
      notice("");
      for (const [number, rating] of Object.entries(changed)) {
        photos[number].rating = rating;
        draw(photos[number]);
      }
      drawStatus();
      then?.(Object.keys(changed).map(Number));
    } catch (error) {
      notice(error.message);
    }
  });
  return line;
}

function notice(text) {
  if ($("notice").textContent !== text) $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---------------------------------------------------------------- what stands

const standing = (photo) => photo.rating ?? photo.proposed;
const isGiven = (photo) => photo.rating !== null;
const words = (photo) => {
  const rating = standing(photo);
  const verdict = rating < 0 ? "reject" : rating ? `keep, ${counted(rating, "star")}` : "keep, no stars";
  return isGiven(photo) ? verdict : `${verdict} (proposed)`;
};

function draw(photo) {
  const { card } = photo;
  const rating = standing(photo);
  card.classList.toggle("reject", rating < 0);
  card.classList.toggle("given", isGiven(photo));
  card.setAttribute("aria-label", `${photo.name}, score ${photo.score.toFixed(2)}, ${words(photo)}`);
  card.querySelector(".verdict").textContent = (rating < 0 ? "reject" : "keep") + (isGiven(photo) ? "" : ", proposed");
  card.querySelector("[data-do=keep]").setAttribute("aria-pressed", rating >= 0);
  card.querySelector("[data-do=reject]").setAttribute("aria-pressed", rating < 0);
  card.querySelectorAll(".stars button").forEach((star, index) => {
    star.classList.toggle("on", index < rating);
    star.setAttribute("aria-pressed", index + 1 === rating);
  });
  const section = photo.section;
  section.element.classList.toggle("decided", section.photos.every(isGiven));
  const pane = panes.find((each) => each.photo === photo);
  if (pane) drawPane(pane);
}

function drawStatus() {
  const given = photos.filter(isGiven).length;
  const kept = photos.filter((photo) => standing(photo) >= 0).length;
  $("progress").max = photos.length;
  $("progress").value = given;
  const failures = state.failures ? `, ${state.failures} not judged` : "";
  $("status").textContent = `${given.toLocaleString("en")} of ${counted(photos.length, "photo")} decided, ${kept.toLocaleString("en")} kept${failures}`;
}

// ---------------------------------------------------------------- building the page

// Photos that are like no other stand together: a row for each would be mostly empty.
function sectionsOf(groups) {
  const sections = [];
  groups.forEach((group, index) => {
    const single = group.photos.length === 1;
    if (single && sections.at(-1)?.single) sections.at(-1).photos.push(...group.photos);
    else sections.push({ single, number: index + 1, photos: [...group.photos], kind: group.kind, reason: group.reason });
  });
  return sections;
}

function sectionElement(section) {
  const element = made("section", section.single ? "group single" : "group");
  const head = made("div", "head");
  const title = section.single
    ? `${section.photos.length === 1 ? "A photo" : counted(section.photos.length, "photo")} like no other`
    : `Group ${section.number}: ${counted(section.photos.length, "shot")}`;
  head.append(made("h2", "", title));
  if (section.kind && section.kind !== "burst") head.append(made("span", "kind", `${section.kind}, kept whole`));
  if (section.reason) head.append(made("span", "quiet", section.reason));
  const accept = made("button", "", "Accept");
  accept.type = "button";
  accept.dataset.do = "accept";
  accept.setAttribute("aria-label", `Accept ${title} as shown`);
  head.append(accept);
  const list = made("ol", "shots");
  list.append(...section.photos.map((photo) => photo.card));
  element.append(head, list);
  element.setAttribute("aria-label", title);
  return element;
}

function cardOf(photo) {
  const card = $("shot").content.firstElementChild.cloneNode(true);
  card.dataset.number = photo.number;
  card.tabIndex = -1;
  const image = card.querySelector("img");
  const source = (side) => `photos/${photo.number}/${side}.jpg`;
  image.fetchPriority = "low";
  image.sizes = "(max-width: 640px) 100vw, 40vw";
  image.srcset = `${source(480)} 480w, ${source(1280)} 1280w`;
  image.src = source(480);
  image.addEventListener("error", () => { image.alt = "no picture"; image.className = "missing"; });
  card.querySelector(".picture").setAttribute("aria-label", `${photo.name} at 100 percent`);
  const name = made("bdi", "", photo.name);
  card.querySelector(".name").append(name);
  card.querySelector(".name").title = photo.name;
  card.querySelector(".close").hidden = !photo.close;
  card.querySelector(".score").append(photo.score.toFixed(2), made("small", "", ` ± ${photo.std.toFixed(2)}`));
  for (let count = 1; count <= 5; count += 1) {
    const star = made("button", "", "★");
    star.type = "button";
    star.dataset.stars = count;
    star.tabIndex = -1;
    star.setAttribute("aria-label", counted(count, "star"));
    card.querySelector(".stars").append(star);
  }
  return card;
}

let sections = [];
async function begin() {
  try {
    state = await ask("state");
  } catch (error) {
    notice(error.message);
    return;
  }
  state.groups.forEach((group) => group.photos.forEach((photo) => {
    photos[photo.number] = Object.assign(photo, { group, card: cardOf(photo) });
  }));
  sections = sectionsOf(state.groups);
  for (const section of sections) {
    section.element = sectionElement(section);
    for (const photo of section.photos) photo.section = section;
  }
  photos.forEach(draw);
  $("groups").append(...sections.map((section) => section.element));
  drawStatus();
  const open = photos.findIndex((photo) => !isGiven(photo));
  goTo(Math.max(open, 0));
}

// Another window, or a start before this one, may have decided meanwhile.
document.addEventListener("visibilitychange", () => {
  if (document.hidden || !state || ended) return;
  line = line.then(async () => { // an answer from before a decision would hide it
    const now = await ask("state").catch(() => null);
    now?.groups.forEach((group) => group.photos.forEach(({ number, rating }) => {
      if (photos[number].rating === rating) return;
      photos[number].rating = rating;
      draw(photos[number]);
    }));
    drawStatus();
  });
});

// ---------------------------------------------------------------- where one is

function reachable(card, yes) {
  card.tabIndex = yes ? 0 : -1;
  card.querySelectorAll("button").forEach((button) => { button.tabIndex = yes ? 0 : -1; });
}

function mark(number) {
  const before = photos[current].card;
  before.removeAttribute("aria-current");
  reachable(before, false);
  current = number;
  const { card } = photos[number];
  card.setAttribute("aria-current", "true");
  reachable(card, true);
}

function goTo(number, smooth = false) {
  mark(number);
  const { card, section } = photos[number];
  if (panes.length) {
    if (panes.some((pane) => pane.photo === photos[number])) panes.forEach(drawPane);
    else openZoom();
    return;
  }
  card.focus({ preventScroll: true });
  const still = !smooth || matchMedia("(prefers-reduced-motion: reduce)").matches;
  const fits = section.element.offsetHeight < innerHeight - 90;
  (fits ? section.element : card).scrollIntoView({ block: fits ? "start" : "nearest", behavior: still ? "auto" : "smooth" });
}

const step = (by) => goTo(clamp(current + by, 0, photos.length - 1), true);

function stepSection(by) {
  const at = sections.indexOf(photos[current].section);
  const next = sections[clamp(at + by, 0, sections.length - 1)];
  goTo(next.photos[0].number, true);
}

// ---------------------------------------------------------------- decisions

const say = (text) => { $("announce").textContent = text; };

function give(ratings, then) {
  return change("ratings", ratings, (changed) => {
    say(changed.length === 1 ? `${photos[changed[0]].name}: ${words(photos[changed[0]])}` : `${counted(changed.length, "photo")} decided`);
    then?.();
  });
}

const kept = (photo) => (standing(photo) >= 0 ? standing(photo) : photo.stars);
const rate = (rating) => give({ [current]: rating });
const DO = {
  keep: () => rate(kept(photos[current])),
  reject: () => rate(-1),
  only: () => give(Object.fromEntries(photos[current].group.photos.map(
    (photo) => [photo.number, photo.number === current ? kept(photo) : -1],
  ))),
  accept: () => {
    const { section } = photos[current];
    give(Object.fromEntries(section.photos.map((photo) => [photo.number, standing(photo)])), () => stepSection(1));
  },
  zoom: (event) => openZoom(event),
  undo: () => change("undo", {}, (changed) => {
    say(changed.length ? `Undone: ${counted(changed.length, "photo")}` : "Nothing is left to be undone");
    if (changed.length && !changed.includes(current)) goTo(Math.min(...changed), true);
  }),
};

$("groups").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  const card = event.target.closest(".shot");
  const group = event.target.closest(".group");
  if (card) mark(Number(card.dataset.number));
  else if (button) mark(sections.find((section) => section.element === group).photos[0].number);
  if (button?.dataset.do) DO[button.dataset.do](event);
  if (button?.dataset.stars) {
    const stars = Number(button.dataset.stars);
    rate(isGiven(photos[current]) && photos[current].rating === stars ? 0 : stars);
  }
});
$("groups").addEventListener("focusin", (event) => {
  const card = event.target.closest(".shot");
  if (panes.length) return; // a dialog that closes gives the focus back to where it was before
  if (card && Number(card.dataset.number) !== current) mark(Number(card.dataset.number));
});
$("undo").addEventListener("click", DO.undo);
$("help").addEventListener("click", () => $("keys").showModal());
document.querySelectorAll("[data-close]").forEach((button) => {
  button.addEventListener("click", () => button.closest("dialog").close());
});

// ---------------------------------------------------------------- keys

const KEYS = {
  l: () => step(1), h: () => step(-1), j: () => stepSection(1), k: () => stepSection(-1),
  ArrowRight: () => step(1), ArrowLeft: () => step(-1),
  ArrowDown: () => stepSection(1), ArrowUp: () => stepSection(-1),
  p: DO.keep, x: DO.reject, b: DO.only, a: DO.accept, u: DO.undo,
  z: () => (panes.length ? $("zoom").close() : openZoom()),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  const other = document.querySelector("dialog[open]:not(#zoom)");
  if (!photos.length || other || event.altKey || event.metaKey && event.key !== "z") return;
  if (event.ctrlKey || event.metaKey) {
    if (event.key !== "z") return;
    event.preventDefault();
    DO.undo();
    return;
  }
  const act = panes.length && moveSpot[event.key] ? () => moveSpot[event.key](event) : KEYS[event.key];
  if (!act && !/^[0-5]$/.test(event.key)) return;
  event.preventDefault();
  if (act) act();
  else rate(Number(event.key));
});

// ---------------------------------------------------------------- 100 %

let panes = [];
let spot = { x: 0.5, y: 0.5 }; // in parts of the photos
let mostPanes = 9; // fewer where the service can't keep the pixels of so many
const AHEAD = 1.6; // a part that is asked for is larger than what is seen of it

async function openZoom(event) {
  const picture = event?.target.closest?.(".picture");
  if (picture && event.detail) spot = spotAt(picture, event);
  const shots = photos[current].group.photos;
  const from = clamp(shots.indexOf(photos[current]) - (mostPanes >> 1), 0, shots.length - mostPanes);
  const shown = shots.slice(from, from + mostPanes);
  const part = shown.length < shots.length ? `${shown.length} of ` : "";
  $("zoom-title").textContent = shots.length === 1 ? "1 photo at 100 %" : `${part}${shots.length} shots at 100 %`;
  panes = shown.map(paneOf);
  $("panes").replaceChildren(...panes.map((pane) => pane.element));
  layOut();
  if (!$("zoom").open) $("zoom").showModal();
  panes.forEach(drawPane);
  // The shots of a group are of a size: the first tells how many panes there may be.
  const opened = panes;
  const [first, ...others] = opened;
  await measure(first);
  if (panes !== opened) return;
  if (panes.length > mostPanes) {
    openZoom();
    return;
  }
  await Promise.all(others.map(measure));
  place();
}

async function measure(pane) {
  try {
    Object.assign(pane, await ask(`photos/${pane.photo.number}/size`));
    mostPanes = Math.min(mostPanes, pane.panes);
  } catch (error) {
    pane.told = error.message;
    drawPane(pane);
  }
}

function spotAt(picture, event) {
  const image = picture.querySelector("img");
  const { left, top, width, height } = image.getBoundingClientRect();
  const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
  const part = (at, side, natural) => clamp((at - (side - natural * scale) / 2) / (natural * scale), 0, 1) || 0;
  return {
    x: part(event.clientX - left, width, image.naturalWidth),
    y: part(event.clientY - top, height, image.naturalHeight),
  };
}

function paneOf(photo) {
  const element = made("div", "pane");
  element.tabIndex = -1;
  element.setAttribute("role", "group");
  element.dataset.number = photo.number;
  const blurred = made("img");
  blurred.alt = "";
  blurred.src = `photos/${photo.number}/1280.jpg`;
  const sharp = made("img");
  sharp.alt = photo.name;
  sharp.hidden = true;
  const caption = made("p");
  element.append(blurred, sharp, caption);
  return { photo, element, blurred, sharp, caption, box: null, busy: false };
}

function layOut() {
  // Panes of about the shape of photos.
  const columns = Math.ceil(Math.sqrt(panes.length * innerWidth / Math.max(1, innerHeight) / 1.6));
  $("panes").style.setProperty("--columns", clamp(columns, 1, panes.length));
}

function drawPane(pane) {
  pane.caption.textContent = pane.told ?? `${words(pane.photo)} · ${pane.photo.score.toFixed(2)} · ${pane.photo.name}`;
  pane.element.setAttribute("aria-label", pane.caption.textContent);
  const here = pane.photo.number === current;
  pane.element.setAttribute("aria-current", here);
  pane.element.tabIndex = here ? 0 : -1;
  if (here) {
    pane.element.focus();
  }
}

// Where a pane's corner lies in its photo, in the photo's pixels; one of them is one of the screen's.
function viewOf(pane) {
  const width = pane.element.clientWidth * devicePixelRatio;
  const height = pane.element.clientHeight * devicePixelRatio;
  const from = (part, whole, seen) => (whole <= seen ? (whole - seen) / 2 : clamp(part * whole - seen / 2, 0, whole - seen));
  return { left: from(spot.x, pane.width, width), top: from(spot.y, pane.height, height), width, height };
}

function place() {
  for (const pane of panes) {
    if (!pane.width) continue;
    const view = viewOf(pane);
    const put = (image, left, top, width) => {
      image.style.width = `${width / devicePixelRatio}px`;
      image.style.transform = `translate(${(left - view.left) / devicePixelRatio}px, ${(top - view.top) / devicePixelRatio}px)`;
    };
    put(pane.blurred, 0, 0, pane.width);
    if (pane.box) put(pane.sharp, pane.box.left, pane.box.top, pane.box.width);
    sharpen(pane, view);
  }
}

async function sharpen(pane, view) {
  const seen = {
    left: Math.max(0, view.left), top: Math.max(0, view.top),
    right: Math.min(pane.width, view.left + view.width), bottom: Math.min(pane.height, view.top + view.height),
  };
  const { box } = pane;
  const covered = box && box.left <= seen.left && box.top <= seen.top
    && box.left + box.width >= seen.right && box.top + box.height >= seen.bottom;
  if (covered || pane.busy) return;
  pane.busy = true;
  // With what is asked for ahead, it is no more than the service gives.
  const ahead = Math.min(AHEAD, Math.sqrt(pane.most / ((seen.right - seen.left) * (seen.bottom - seen.top))));
  const side = (from, to, whole) => {
    const length = Math.min(whole, Math.max(Math.ceil(to - from) + 2, Math.floor((to - from) * ahead)));
    return [Math.floor(clamp((from + to - length) / 2, 0, whole - length)), length];
  };
  const [left, width] = side(seen.left, seen.right, pane.width);
  const [top, height] = side(seen.top, seen.bottom, pane.height);
  const image = new Image();
  image.src = `photos/${pane.photo.number}/${left}-${top}-${width}-${height}.jpg`;
  try {
    await image.decode();
  } catch {
    pane.told = `${pane.photo.name}: this part can't be shown`;
    drawPane(pane);
    return;
  } finally {
    pane.busy = false;
  }
  if (pane.told) {
    pane.told = null;
    drawPane(pane);
  }
  pane.box = { left, top, width, height };
  image.alt = pane.photo.name;
  pane.sharp.replaceWith(image);
  pane.sharp = image;
  place(); // the spot may have moved on
}

function move(x, y) {
  const pane = panes.find((each) => each.width);
  if (!pane) return;
  const { width, height } = viewOf(pane);
  // Nearer to an edge the view would not follow, and a move back would do nothing at first.
  const inside = (at, by, part) => clamp(clamp(at, part / 2, 1 - part / 2) + by, part / 2, 1 - part / 2);
  spot = { x: inside(spot.x, x, Math.min(1, width / pane.width)), y: inside(spot.y, y, Math.min(1, height / pane.height)) };
  requestAnimationFrame(place);
}

const moveBy = (x, y) => (event) => move(x * (event.shiftKey ? 0.2 : 0.04), y * (event.shiftKey ? 0.2 : 0.04));
const moveSpot = {
  ArrowLeft: moveBy(-1, 0), ArrowRight: moveBy(1, 0), ArrowUp: moveBy(0, -1), ArrowDown: moveBy(0, 1),
};

$("panes").addEventListener("pointerdown", (event) => {
  const pane = event.target.closest(".pane");
  if (!pane) return;
  mark(Number(pane.dataset.number));
  panes.forEach(drawPane);
  pane.setPointerCapture(event.pointerId);
});
// A mouse looks over the whole photo within a pane; a finger pulls the photo along.
let pointer = null; // where it was last
$("panes").addEventListener("pointermove", (event) => {
  const before = pointer?.pointerId === event.pointerId ? pointer : event;
  pointer = event;
  const pane = panes.find((each) => each.element === event.target.closest(".pane"));
  if (!pane?.width) return;
  const [x, y] = [event.clientX - before.clientX, event.clientY - before.clientY];
  if (event.pointerType === "mouse") move(x / pane.element.clientWidth, y / pane.element.clientHeight);
  else move(-x * devicePixelRatio / pane.width, -y * devicePixelRatio / pane.height);
});
for (const gone of ["pointerleave", "pointerup", "pointercancel"]) {
  $("panes").addEventListener(gone, () => { pointer = null; });
}
$("zoom").addEventListener("close", () => {
  panes = [];
  $("panes").replaceChildren();
  goTo(current);
});
addEventListener("resize", () => { if (panes.length) { layOut(); place(); } });

// ---------------------------------------------------------------- the end

$("finish").addEventListener("click", () => {
  const rejects = photos.filter((photo) => standing(photo) < 0).length;
  const proposed = photos.filter((photo) => !isGiven(photo)).length;
  const counts = `${counted(photos.length - rejects, "photo")} kept, ${counted(rejects, "reject")}`;
  const open = proposed ? `; nobody decided about ${proposed.toLocaleString("en")} of them, so the proposal stands` : "";
  const will = state.will
    ? `${state.dry_run ? "It is told, and not done, how to" : "This will"} ${state.will}. Nothing is deleted, and what is done can be undone.`
    : "The command was given nothing to do with them; it says what it can do.";
  $("end-text").textContent = `${counts}${open}. ${will}`;
  $("end").showModal();
});

$("end-do").addEventListener("click", async () => {
  $("end-do").disabled = $("end-cancel").disabled = true;
  ended = true; // nothing more is decided
  await line;
  try {
    const { lines, failed } = await ask("finish", {});
    const done = state.dry_run ? "What would be done" : "Finished";
    $("end-title").textContent = failed ? "Not finished" : done;
    $("end-text").textContent = "The service has ended; this page can be closed. What was decided stays, and the same command goes on with it.";
    $("end-lines").textContent = lines.join("\n");
    $("end-lines").hidden = false;
    if (!$("end").open) $("end").showModal(); // a second Escape closes it all the same
    $("end-do").hidden = $("end-cancel").hidden = true;
    document.querySelectorAll("header button").forEach((button) => { button.disabled = true; });
  } catch (error) {
    ended = false;
    $("end-text").textContent = error.message;
    $("end-do").disabled = $("end-cancel").disabled = false;
  }
});
$("end").addEventListener("cancel", (event) => {
  if (ended && !$("end-do").hidden) event.preventDefault(); // what was begun can't be called off
});

begin();
