// The camera page. Frames go out one at a time: the next one only when the last is answered, so
// nothing queues up. What to do is decided by the service; this page only shows it.

const $ = (id) => document.getElementById(id);
const show = (element, visible) => { element.hidden = !visible; };
const made = (name, className, text) => {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

const TREND_MS = 20_000;
const BEST_SECONDS = 5;
const STALE_MS = 4_000; // what was said of a picture so long ago says nothing of this one
const ANSWER_MS = 15_000; // an answer that takes longer does not come
const PHOTO_MS = 20_000; // nobody waits for a single photo of a folder
const UPLOADS = 2;
const TRIES = 8;
const SHOWN_NEIGHBOURS = 5;

// ---------------------------------------------------------------- the service

let patience = 2000;
let key = sessionStorage.getItem("meiqa-key") || null;
const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function meetService() {
  try {
    const answer = await fetch("v1/model", { headers: headers() });
    if (answer.status === 401) return askForKey();
    if (!answer.ok) throw new Error((await problemOf(answer)).detail);
    const model = await answer.json();
    const count = model.memory.anchors + model.memory.contrast;
    $("service").textContent = `${model.precision.toUpperCase()} model, ${count.toLocaleString("en")} remembered photos`;
    patience = Math.min(PHOTO_MS, model.limits.max_budget_ms);
    notice("");
  } catch (error) {
    notice(`The service does not answer (${error.message}). Is it still running?`);
  }
}

async function problemOf(answer) {
  try { return await answer.json(); } catch { return { detail: `${answer.status} ${answer.statusText}` }; }
}

function notice(text) {
  if ($("notice").textContent !== text) $("notice").textContent = text;
  show($("notice"), Boolean(text));
}

function askForKey() {
  stopCamera();
  show($("key-form"), true);
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("meiqa-key", key);
  $("key").value = "";
  show($("key-form"), false);
  meetService();
});

// ---------------------------------------------------------------- modes

let mode = "camera";
const camera = { stream: null, socket: null, attempt: 0 };

function setMode(next) {
  mode = next;
  $("show-camera").setAttribute("aria-pressed", String(mode === "camera"));
  $("show-photos").setAttribute("aria-pressed", String(mode === "photos"));
  if (mode === "photos") stopCamera();
  layOut();
}

function layOut() {
  const live = Boolean(camera.stream);
  const photos = mode === "photos";
  show($("video"), live);
  show($("meter"), live);
  show($("camera-controls"), !photos && (live || best.some(Boolean)));
  show($("stop"), live);
  show($("lenses"), live && $("lenses").options.length > 1);
  show($("photos"), photos && shots.length > 0);
  show($("photo"), photos && Boolean(chosen));
  show($("empty"), photos ? shots.length === 0 : !live);
  show($("start"), !photos);
  $("pick").classList.toggle("primary", photos);
  show($("trend-section"), !photos);
  if (!live) show($("instruction"), false);
  $("empty-title").textContent = photos ? "Choose photos to judge" : "Point a camera at something";
  $("empty-text").textContent = photos
    ? "One, or a folder of thousands: each gets its score, best first if you like. They are judged by the service that this page comes from, and not kept."
    : "You see its score while you move, and one thing to do at a time. Pictures are judged by the service that this page comes from, and not kept.";
}

function sayEmpty(title, text) {
  layOut();
  $("empty-title").textContent = title;
  $("empty-text").textContent = text;
}

$("show-camera").addEventListener("click", () => setMode("camera"));
$("show-photos").addEventListener("click", () => setMode("photos"));

// ---------------------------------------------------------------- the camera

const REFUSALS = {
  NotAllowedError: ["The camera is blocked", "Allow it for this page in the browser's address bar, then try again. Photos can be chosen without it."],
  NotFoundError: ["No camera was found", "Plug one in and try again, or choose photos."],
  NotReadableError: ["The camera is in use", "Another program has it. Close that one and try again."],
  OverconstrainedError: ["This camera can't be used", "Choose another one, or choose photos."],
};

async function startCamera(deviceId) {
  if (!navigator.mediaDevices?.getUserMedia) {
    return sayEmpty("The browser keeps its camera from this page", "It gives cameras to https and to localhost only. From another device, reach this service through https or an SSH tunnel.");
  }
  $("start").disabled = true;
  try {
    const wanted = deviceId ? { deviceId: { exact: deviceId } } : { facingMode: { ideal: "environment" } };
    const stream = await navigator.mediaDevices.getUserMedia({
      video: { ...wanted, width: { ideal: 1920 }, height: { ideal: 1080 } }, audio: false,
    });
    letGo();
    camera.stream = stream;
    stream.getVideoTracks()[0].addEventListener("ended", () => {
      stopCamera();
      sayEmpty("The camera went away", "It was unplugged, or another program took it.");
    });
    $("video").srcObject = stream;
    const settings = stream.getVideoTracks()[0].getSettings();
    $("video").classList.toggle("mirrored", settings.facingMode === "user");
    await $("video").play();
    fitFrame($("video").videoWidth, $("video").videoHeight);
    setMode("camera");
    listLenses(settings.deviceId);
    connect();
    $("stop").focus({ preventScroll: true });
  } catch (error) {
    stopCamera();
    sayEmpty(...(REFUSALS[error.name] || ["The camera did not start", error.message]));
    $("start").textContent = "Try again";
  } finally {
    $("start").disabled = false;
  }
}

function letGo() {
  camera.stream?.getTracks().forEach((track) => track.stop());
  camera.stream = null;
  $("video").srcObject = null;
  const socket = camera.socket;
  camera.socket = null;
  socket?.close();
}

function stopCamera() {
  letGo();
  $("start").textContent = "Use the camera";
  layOut();
}

function fitFrame(width, height) {
  $("frame").style.aspectRatio = width && height ? `${width} / ${height}` : "";
}

async function listLenses(current) {
  const devices = (await navigator.mediaDevices.enumerateDevices()).filter((one) => one.kind === "videoinput");
  $("lenses").replaceChildren(...devices.map((device, i) => new Option(device.label || `Camera ${i + 1}`, device.deviceId, false, device.deviceId === current)));
  layOut();
}

$("start").addEventListener("click", () => startCamera());
$("stop").addEventListener("click", () => { stopCamera(); $("start").focus(); });
$("lenses").addEventListener("change", () => startCamera($("lenses").value));

// ---------------------------------------------------------------- frames out, answers in

const flight = { since: 0, bitmap: null, times: [], sent: 0, dropped: 0 };

function connect() {
  const socket = new WebSocket(new URL("v1/live", location.href.replace(/^http/, "ws")));
  camera.socket = socket;
  Object.assign(flight, { since: 0, times: [], dropped: 0 });
  full = null;
  let maxPixels = 0;
  socket.addEventListener("open", () => {
    const rate = camera.stream.getVideoTracks()[0].getSettings().frameRate ?? null;
    socket.send(JSON.stringify({ type: "hello", token: key, camera_hz: rate }));
  });
  socket.addEventListener("message", ({ data }) => {
    if (camera.socket !== socket) return;
    const message = JSON.parse(data);
    if (message.type === "ready") {
      maxPixels = message.max_pixels;
      camera.attempt = 0;
      notice("");
      nextFrame(socket, maxPixels);
    } else if (message.type === "answer") {
      onAnswer(message);
      nextFrame(socket, maxPixels);
    } else if (message.problem.status === 401) {
      askForKey();
    } else {
      onProblem(message.problem, "frame" in message ? () => nextFrame(socket, maxPixels) : null);
    }
  });
  socket.addEventListener("close", () => {
    if (camera.socket !== socket) return;
    camera.attempt += 1;
    loseTouch();
    notice("The connection to the service is gone. Trying again …");
    setTimeout(() => { if (camera.socket === socket && camera.stream) connect(); }, Math.min(8000, 500 * 2 ** camera.attempt));
  });
}

// Nothing is known of what is before the camera now: neither score nor advice may stand.
function loseTouch() {
  full = null;
  trend = [];
  flight.bitmap?.close();
  flight.bitmap = null;
  shownCode = "";
  $("meter").textContent = "";
  show($("instruction"), false);
  if (mode === "camera") {
    show($("found"), false);
    show($("waiting"), true);
  }
}

function onProblem(problem, goOn) {
  flight.bitmap?.close();
  flight.bitmap = null;
  const wait = problem.retry_after_ms ?? 500;
  $("meter").textContent = problem.retryable ? "busy, trying again" : "not judged";
  if (!problem.retryable) notice(problem.detail);
  if (goOn) setTimeout(goOn, Math.max(100, wait));
}

function nextFrame(socket, maxPixels) {
  const video = $("video");
  const go = () => sendFrame(socket, maxPixels);
  if (camera.socket !== socket) return;
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(go);
  else requestAnimationFrame(go);
}

const canvas = document.createElement("canvas");

async function sendFrame(socket, maxPixels) {
  const video = $("video");
  if (camera.socket !== socket || socket.readyState !== WebSocket.OPEN || !video.videoWidth) return;
  // The model looks at so many pixels; more of them would only take time on the way.
  const scale = Math.min(1, Math.sqrt((1.1 * maxPixels) / (video.videoWidth * video.videoHeight)));
  canvas.width = Math.round(video.videoWidth * scale);
  canvas.height = Math.round(video.videoHeight * scale);
  const context = canvas.getContext("2d", { alpha: false });
  context.imageSmoothingQuality = "high";
  const whole = await createImageBitmap(video); // of the same moment, for the best shot
  context.drawImage(whole, 0, 0, canvas.width, canvas.height);
  const jpeg = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  if (camera.socket !== socket || socket.readyState !== WebSocket.OPEN || !jpeg) return whole.close();
  flight.bitmap?.close();
  flight.bitmap = whole;
  const sent = ++flight.sent;
  flight.since = performance.now();
  socket.send(jpeg);
  const unanswered = () => flight.sent === sent && flight.since && camera.socket === socket;
  setTimeout(() => { if (unanswered()) { loseTouch(); $("meter").textContent = "waiting for the service"; } }, STALE_MS);
  setTimeout(() => { if (unanswered()) socket.close(); }, ANSWER_MS);
}

let full = null; // the full assessment that stands
let hurried = false; // there was no time for one, and the camera is still held still

function onAnswer(answer) {
  const now = performance.now();
  const { assessment } = answer;
  flight.since = 0;
  flight.dropped = answer.dropped;
  flight.times = [...flight.times.filter((at) => now - at < 3000), now];
  if (!answer.stands) full = null;
  else if (answer.kind === "full") full = assessment;
  hurried = answer.still && !full && (hurried || answer.kind === "full");
  keepBest(answer.change?.level ?? assessment.score, assessment.score, now);
  if (answer.change) remember(answer.change, now);
  // One look at a time: nothing of another one is laid over it.
  showAssessment(full ?? assessment, full ? depthOf(full) : "quick look");
  drawTrend(now);
  showInstruction(answer.instruction);
  const span = (now - flight.times[0]) / 1000;
  const rate = span > 0.5 ? `${((flight.times.length - 1) / span).toFixed(1)} a second` : "";
  $("meter").textContent = answer.kind === "full" ? "looking closely" : rate;
  document.body.dataset.answers = String(Number(document.body.dataset.answers ?? 0) + 1);
  const told = answer.change && answer.change.code !== "steady" ? `${answer.change.text}. ` : "";
  announce(`${told}${answer.instruction.text}. Score ${spoken(full ?? assessment)}`);
}

let shownCode = "";

function showInstruction(instruction) {
  show($("instruction"), true);
  if (instruction.code === shownCode) return;
  shownCode = instruction.code;
  $("instruction-text").textContent = instruction.text;
  $("instruction-reason").textContent = instruction.reason;
  $("instruction").dataset.code = instruction.code;
  $("instruction").classList.toggle("good", instruction.good);
  $("instruction").classList.remove("arrives");
  void $("instruction").offsetWidth; // or the animation would not begin anew
  $("instruction").classList.add("arrives");
}

// ---------------------------------------------------------------- the best shot

const best = new Array(BEST_SECONDS).fill(null); // the best of each second, with its own pixels

function keepBest(level, score, now) {
  const bitmap = flight.bitmap;
  flight.bitmap = null;
  if (!bitmap) return;
  const second = Math.floor(now / 1000);
  best.forEach((one, i) => {
    if (one && one.second <= second - BEST_SECONDS) { one.bitmap.close(); best[i] = null; }
  });
  const slot = second % BEST_SECONDS;
  if (best[slot] && best[slot].level >= level) return bitmap.close();
  best[slot]?.bitmap.close();
  best[slot] = { second, level, score, bitmap };
  const leader = bestShot();
  const small = $("best-shot");
  const scale = Math.max(small.width / leader.bitmap.width, small.height / leader.bitmap.height);
  const [width, height] = [leader.bitmap.width * scale, leader.bitmap.height * scale];
  small.getContext("2d").drawImage(leader.bitmap, (small.width - width) / 2, (small.height - height) / 2, width, height);
  $("best-score").textContent = leader.score.toFixed(2);
  show($("best"), true);
}

const bestShot = () => best.reduce((a, b) => (b && (!a || b.level > a.level) ? b : a), null);

$("save").addEventListener("click", () => {
  const leader = bestShot();
  if (!leader) return;
  const sheet = document.createElement("canvas");
  sheet.width = leader.bitmap.width;
  sheet.height = leader.bitmap.height;
  sheet.getContext("2d", { alpha: false }).drawImage(leader.bitmap, 0, 0);
  const when = new Date().toISOString().slice(0, 19).replace(/[T:]/g, "-");
  const name = `meiqa-${when}-${leader.score.toFixed(2)}.jpg`;
  sheet.toBlob((blob) => save(blob, name), "image/jpeg", 0.95);
  announce(`Saved ${name}`, true);
});

function save(blob, name) {
  const link = made("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---------------------------------------------------------------- the judgement

const percent = (share) => `${Math.round(100 * share)} %`;
const onScale = (score) => `${Math.max(0, Math.min(100, 25 * (score - 1)))}%`;
const spoken = (found) => `${found.score.toFixed(1)}, ${found.word}.`;

function undescribed(depth) {
  if (depth !== "quick look") return "There was no time to describe it.";
  return hurried ? "There was no time to describe it yet; it is tried again." : "It is described as soon as you hold still.";
}

function showAssessment(found, depth) {
  show($("waiting"), false);
  show($("found"), true);
  const [low, high] = found.ci95.map((end) => Math.max(1, Math.min(5, end)));
  $("score").textContent = found.score.toFixed(2);
  $("word").textContent = found.word;
  $("interval").textContent = `likely ${low.toFixed(1)} to ${high.toFixed(1)}`;
  $("percentile").textContent = found.percentile === null ? "" : `above ${Math.round(found.percentile)} % of its memory`;
  $("depth").textContent = depth;
  $("depth").className = depth === "in full" ? "chip full" : "chip";
  placeOnScale($("band"), $("needle"), found.score, low, high);
  $("summary").textContent = found.reflection || found.summary || undescribed(depth);
  showDistortions(found.distortions ?? []);
  showNeighbours(found);
  showStages(found);
}

// The rest of what is degraded tells of the photo itself.
const leftOut = ({ degraded }) => degraded.filter((note) => !/^(small: |pixels damaged|colour profile )/.test(note));

const depthOf = (found) => (leftOut(found).length ? "cut short" : "in full");

function placeOnScale(band, needle, score, low, high) {
  band.style.setProperty("--from", onScale(low));
  band.style.setProperty("--width", `${25 * (high - low)}%`);
  needle.style.setProperty("--at", onScale(score));
}

function bar(className, variables) {
  const outer = made("span", `bar ${className}`);
  const inner = made("i");
  for (const [name, value] of Object.entries(variables)) inner.style.setProperty(name, value);
  outer.append(inner);
  outer.setAttribute("aria-hidden", "true");
  return outer;
}

function showDistortions(distortions) {
  $("distortions").replaceChildren(...distortions.map((one) => {
    const row = made("li");
    row.append(made("span", "", one.kind), made("span", "quiet", `${one.strength.toFixed(1)} of 5, ${percent(one.probability)} sure`));
    row.append(bar("", { "--width": percent((one.probability * one.strength) / 5).replace(" ", "") }));
    return row;
  }));
}

function showNeighbours({ neighbours }) {
  const asked = neighbours.filter((one) => one.preference !== null);
  const decisive = asked.sort((a, b) => Math.abs(b.preference - 0.5) - Math.abs(a.preference - 0.5));
  const rows = decisive.map(neighbourRow);
  const none = made("li", "quiet", "It was compared with none.");
  $("neighbours").replaceChildren(...(rows.length ? rows.slice(0, SHOWN_NEIGHBOURS) : [none]));
  $("other-neighbours").replaceChildren(...rows.slice(SHOWN_NEIGHBOURS));
  show($("more-neighbours"), rows.length > SHOWN_NEIGHBOURS);
  $("more-neighbours").querySelector("summary").textContent = `${rows.length - SHOWN_NEIGHBOURS} more`;
  const all = () => decisive.forEach((one, i) => furnish(rows[i], one));
  all();
  recall(decisive).then(all);
}

const word = (score) => ["bad", "poor", "fair", "good", "excellent"][Math.max(0, Math.min(4, Math.floor(1.25 * (score - 1))))];

function neighbourRow(one) {
  const wins = one.preference >= 0.5;
  const row = made("li", wins ? "won" : "lost");
  row.title = one.id;
  const words = `${word(one.score)[0].toUpperCase()}${word(one.score).slice(1)} photo`;
  const name = made("span", "name", words);
  const whose = one.origin === "anchor" ? "by people" : "learned";
  row.append(name, made("span", "quiet", `${one.score.toFixed(2)} ${whose}`));
  row.append(made("span", "quiet", `yours is ${wins ? "better" : "worse"}, ${percent(wins ? one.preference : 1 - one.preference)}`));
  const half = 100 * Math.abs(one.preference - 0.5);
  row.append(bar("", { "--from": `${wins ? 50 : 50 - half}%`, "--width": `${half}%` }));
  return row;
}

// What is remembered of photos: what is seen in them, and a thumbnail where one is kept.
const known = new Map();
const nameOf = ({ origin, id }) => `${origin} ${id}`;

async function recall(neighbours) {
  const asked = neighbours.filter((one) => !known.has(nameOf(one)));
  if (!asked.length) return;
  for (const one of asked) known.set(nameOf(one), null);
  const ids = new URLSearchParams(asked.map(({ id }) => ["id", id]));
  const answer = await fetch(`v1/memory/cases/chosen?${ids}`, { headers: headers() }).catch(() => null);
  if (!answer?.ok) return; // the rows have words without it
  for (const one of (await answer.json()).cases) known.set(nameOf(one), one);
}

function furnish(row, one) {
  const found = known.get(nameOf(one));
  if (found?.summary) row.querySelector(".name").textContent = found.summary;
  if (!found?.thumbnail || row.querySelector("img")) return;
  const image = made("img");
  image.src = `data:image/jpeg;base64,${found.thumbnail}`;
  image.alt = "";
  row.classList.add("pictured");
  row.prepend(image);
}

const STAGES = ["queue", "decode", "detail", "read", "describe", "retrieve", "compare", "fuse", "patterns", "reflect"];

function showStages(found) {
  const { timings_ms: ms } = found;
  const stages = STAGES.filter((name) => ms[name] >= 0.05);
  const total = (ms.queue ?? 0) + ms.total;
  const strengths = stages.map((_, i) => String(1 - 0.75 * (i / Math.max(1, stages.length - 1))));
  $("stages").replaceChildren(...stages.map((name, i) => {
    const piece = made("i");
    piece.style.setProperty("--share", String(ms[name]));
    piece.style.setProperty("--strength", strengths[i]);
    return piece;
  }));
  const entries = stages.map((name, i) => {
    const entry = made("li");
    const dot = made("i");
    dot.style.setProperty("--strength", strengths[i]);
    entry.append(dot, `${name} ${ms[name] < 10 ? ms[name].toFixed(1) : Math.round(ms[name])} ms`);
    return entry;
  });
  const sum = made("li");
  sum.append(made("b", "", `${Math.round(total)} ms in all`));
  $("legend").replaceChildren(sum, ...entries);
  $("left-out").textContent = found.degraded.length ? `Note: ${found.degraded.join(", ")}` : "";
}

// ---------------------------------------------------------------- the trend

let trend = [];

const MARKS = { better: "▲", worse: "▼", steady: "", new: "" };

function remember(change, now) {
  trend.push({ at: now, ...change });
  trend = trend.filter((one) => now - one.at <= TREND_MS);
}

// Levels are the service's: each frame was compared with the best of its scene.
function drawTrend(now) {
  const placed = ({ at, level }) => [360 - (360 * (now - at)) / TREND_MS, 74 - 16 * (Math.max(1, Math.min(5, level)) - 1)];
  const runs = trend.reduce((all, one) => {
    if (all.at(-1)?.at(-1).scene === one.scene) all.at(-1).push(one);
    else all.push([one]);
    return all;
  }, []).map((run) => run.map((one) => placed(one).map((value) => value.toFixed(1))));
  const lines = runs.map((run) => `M${run.map((point) => point.join(" ")).join("L")}`);
  $("trend-line").setAttribute("d", lines.join(""));
  $("trend-area").setAttribute("d", runs.map((run, i) => `${lines[i]}L${run.at(-1)[0]} 84L${run[0][0]} 84Z`).join(""));
  const last = trend.at(-1);
  const text = last ? `${MARKS[last.code]} ${last.text}`.trim() : "";
  for (const id of ["trend-text", "change"]) {
    if ($(id).textContent !== text) $(id).textContent = text;
    $(id).dataset.code = last?.code ?? "";
  }
}

// ---------------------------------------------------------------- what a screen reader hears

let announced = { text: "", at: -Infinity };

function announce(text, atOnce = false) {
  const now = performance.now();
  if (text === announced.text || (!atOnce && now - announced.at < 4000)) return;
  announced = { text, at: now };
  $("announce").textContent = text;
}

// ---------------------------------------------------------------- photos

const shots = []; // { file, row, cells, found, error, state }
let chosen = null;
let running = 0;
let halted = false;
let began = 0;

$("pick").addEventListener("click", () => $("files").click());
$("more").addEventListener("click", () => $("files").click());
$("pick-folder").addEventListener("click", () => $("folder").click());
$("more-folder").addEventListener("click", () => $("folder").click());
for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", () => { addPhotos([...$(id).files]); $(id).value = ""; });
}

// Browsers know few of these by themselves: of a HEIC or RAW file most of them tell no type.
const SUFFIXES = "3fr arw avif bmp cr2 cr3 crw dcr dng erf fff gif heic heif hif iiq jfif jp2 jpe jpeg jpg jxl kdc mef mos mpo mrw nef nrw orf pef pgm png pnm ppm raf rw2 rwl sr2 srf srw tif tiff webp x3f".split(" ");
const isPhoto = ({ name, type }) => type.startsWith("image/") || SUFFIXES.includes(name.toLowerCase().split(".").at(-1));

function addPhotos(files) {
  const photos = files.filter(isPhoto);
  const others = files.length - photos.length;
  if (!photos.length) {
    notice(files.length ? "None of these files is a photo." : "");
    return;
  }
  notice(others ? `${others === 1 ? "1 file is no photo and is" : `${others} files are no photos and are`} left out.` : "");
  setMode("photos");
  if (!running) began = performance.now();
  halted = false;
  for (const file of photos) shots.push(addRow({ file, state: "waits", found: null, error: null }));
  layOut();
  showProgress();
  while (running < UPLOADS && shots.some((one) => one.state === "waits")) work();
}

function addRow(shot) {
  const row = made("tr");
  const canvas = made("canvas");
  canvas.width = 112;
  canvas.height = 84;
  const picture = made("td", "picture");
  picture.append(canvas);
  const open = made("button", "", shot.file.webkitRelativePath || shot.file.name);
  open.type = "button";
  open.addEventListener("click", () => choose(shot));
  const name = made("td");
  const reason = made("p", "failed");
  name.append(open, reason);
  const number = made("td", "number");
  number.append(made("span", "state", "waits"));
  row.append(picture, name, number, made("td", "spread"));
  $("rows").append(row);
  return Object.assign(shot, { row, canvas, open, reason, number, spread: row.lastChild });
}

async function work() {
  running += 1;
  for (;;) {
    const shot = halted ? null : shots.find((one) => one.state === "waits");
    if (!shot) break;
    shot.state = "runs";
    shot.number.replaceChildren(made("span", "state", "…"));
    drawThumbnail(shot);
    await judge(shot);
    showRow(shot);
    showProgress();
  }
  running -= 1;
  showProgress();
}

async function judge(shot) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      const answer = await fetch(`v1/score?budget_ms=${patience}`, {
        method: "POST",
        headers: { "Content-Type": shot.file.type || "application/octet-stream", ...headers() },
        body: shot.file,
      });
      if (answer.ok) {
        shot.found = await answer.json();
        shot.state = "done";
        return;
      }
      const problem = await problemOf(answer);
      if (answer.status === 401) { halted = true; askForKey(); }
      if (answer.status !== 503 || attempt === TRIES) throw new Error(problem.what || problem.detail);
      shot.number.replaceChildren(made("span", "state", "service is busy"));
      await sleep(Math.max(problem.retry_after_ms ?? 500, 200 * attempt));
    } catch (error) {
      shot.state = "failed";
      shot.error = error instanceof TypeError ? "the service was not reached" : error.message.replace(/^image /, "it ");
      return;
    }
  }
}

async function drawThumbnail(shot) {
  try {
    const bitmap = await createImageBitmap(shot.file, { resizeWidth: 160, resizeQuality: "medium" });
    const { width, height } = shot.canvas;
    const scale = Math.max(width / bitmap.width, height / bitmap.height);
    const [w, h] = [bitmap.width * scale, bitmap.height * scale];
    shot.canvas.getContext("2d").drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
    bitmap.close();
  } catch { /* the browser can't show it; perhaps the service can judge it */ }
}

function showRow(shot) {
  shot.spread.replaceChildren();
  shot.reason.textContent = shot.error ?? "";
  if (shot.state === "failed") {
    shot.number.replaceChildren(made("span", "failed", "–"));
    return;
  }
  const { score, ci95 } = shot.found;
  shot.number.textContent = score.toFixed(2);
  const track = made("div", "track");
  const [band, needle] = [made("div", "band"), made("div", "needle")];
  placeOnScale(band, needle, score, Math.max(1, ci95[0]), Math.min(5, ci95[1]));
  track.append(band, needle);
  shot.spread.append(track);
  if ($("best-first").checked) order();
  if (!chosen) choose(shot);
}

function choose(shot) {
  chosen?.row.removeAttribute("aria-current");
  if ($("photo").src) URL.revokeObjectURL($("photo").src);
  chosen = shot;
  shot.row.setAttribute("aria-current", "true");
  $("photo").src = URL.createObjectURL(shot.file);
  $("photo").alt = shot.file.name;
  fitFrame(0, 0);
  layOut();
  if (shot.found) {
    showAssessment(shot.found, depthOf(shot.found));
    announce(`${shot.file.name}: ${spoken(shot.found)}`, true);
  }
  if (shot.error) notice(`${shot.file.name}: ${shot.error}`);
}

function order() {
  const rank = (one) => one.found?.score ?? (one.state === "failed" ? -2 : -1);
  const rows = $("best-first").checked ? [...shots].sort((a, b) => rank(b) - rank(a)) : shots;
  $("rows").append(...rows.map((one) => one.row));
}

function showProgress() {
  const done = shots.filter((one) => one.state === "done").length;
  const failed = shots.filter((one) => one.state === "failed").length;
  const left = shots.length - done - failed;
  const seconds = (performance.now() - began) / 1000;
  $("progress").max = shots.length || 1;
  $("progress").value = done + failed;
  const pace = done && left && running ? `, about ${Math.ceil((left * seconds) / done)} s left` : "";
  const text = `${done} of ${shots.length} judged` + (failed ? `, ${failed} failed` : "") + pace;
  $("progress-text").textContent = text;
  show($("halt"), running > 0);
  show($("again"), running === 0 && (failed > 0 || left > 0));
  $("again").textContent = left ? "Go on" : "Try failed ones again";
  show($("table-csv"), done > 0);
  announce(`${text}.`, left === 0);
}

$("best-first").addEventListener("change", order);
$("halt").addEventListener("click", () => { halted = true; });
$("again").addEventListener("click", () => {
  for (const one of shots) if (one.state === "failed") Object.assign(one, { state: "waits", error: null });
  halted = false;
  began = performance.now();
  while (running < UPLOADS && shots.some((one) => one.state === "waits")) work();
});

const quoted = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);

$("table-csv").addEventListener("click", () => {
  const rows = shots.map(({ file, found, error }) => [
    file.webkitRelativePath || file.name, found?.score, found?.std, found?.ci95[0], found?.ci95[1], found?.word, found?.summary, error,
  ]);
  const lines = [["path", "score", "std", "ci95_low", "ci95_high", "word", "summary", "error"], ...rows];
  const text = lines.map((row) => row.map((cell) => quoted(String(cell ?? ""))).join(",")).join("\n");
  save(new Blob([text + "\n"], { type: "text/csv" }), "meiqa.csv");
});

// ---------------------------------------------------------------- dropping

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const entries = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!entries.length) return files;
    for (const one of entries) files.push(...(await filesOf(one)));
  }
}

const brings = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => { if (brings(event)) { event.preventDefault(); show($("drop"), true); } });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) show($("drop"), false); });
addEventListener("drop", async (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  show($("drop"), false);
  // The list of items is empty once this handler has returned, so entries are taken at once.
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  addPhotos((await Promise.all(entries.map(filesOf))).flat());
});

layOut();
meetService();
