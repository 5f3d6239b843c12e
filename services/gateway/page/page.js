// The page: reads the last 100 numbers, then follows the live feed from there. Whatever goes wrong
// with the feed, the page starts over with the last 100, so that nothing is missing.

const KEEP = 100;
const GREATEST = 999000;
const TICKS_A_MINUTE = 120;
const MINUTE_MS = 60000;
const POLL_MS = 1000;
const NO_ANSWER_MS = 1500; // HAProxy asks another gateway after 800 ms
const QUIET_MS = 15000; // by chance once in a million times: 30 ticks without a number
const SHOW_LOST_MS = 60000;
/** What a replica counts; the others count requests. */
const WORK = { even: "number given", odd: "number given", multiplier: "slot settled" };

const element = (id) => document.getElementById(id);
const THRESHOLD = Number(element("threshold").value); // the gateway writes it into the page
const decimal = new Intl.NumberFormat();
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium", hourCycle: "h23" });

let numbers = []; // oldest first
let times = []; // of all that is known from the last minute, and of one before it, oldest first
let lastSeq = 0;
let feed = null;
let restartTimer = 0;
let runs = 0; // how often the page has started over
let failures = 0; // polls in a row
let behind = 0; // polls that knew of more than the feed has brought
let clockOffsetMs = 0; // the gateway's clock less ours
let replicas = new Map(); // by id, with the time at which each was last listed
let token = sessionStorage.getItem("token") ?? "";

const serverNow = () => Date.now() + clockOffsetMs;

/** A number of things: "1 slot settled", "2 slots settled". */
const count = (n, thing) => `${decimal.format(n)} ${n === 1 ? thing : thing.replace(/^\w+/, "$&s")}`;

/** How many of the pairs of an even and an odd number have a product above the threshold. */
function publishProbability() {
  let above = 0;
  let all = 0;
  for (let even = 0; even <= 1000; even += 2) {
    for (let odd = 1; odd <= 999; odd += 2) {
      all += 1;
      above += even * odd > THRESHOLD ? 1 : 0;
    }
  }
  return above / all;
}

function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function show(state, text) {
  const status = element("status");
  document.body.dataset.state = state;
  // A screen reader speaks when this changes, so it changes only when there is something to say.
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = state;
}

// ---- reading

async function get(path) {
  const used = token;
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  const request = fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(5000) });
  // The feed of a frozen gateway only falls silent.
  const late = setTimeout(() => show("disconnected", "disconnected: no answer"), NO_ANSWER_MS);
  const answer = await request.finally(() => clearTimeout(late));
  const date = Date.parse(answer.headers.get("date"));
  if (date) clockOffsetMs = date - Date.now();
  // An answer to a token that was replaced meanwhile says nothing.
  if (answer.status === 401 && used === token) askForToken();
  return answer;
}

/** Ends whatever is going on, so that there is one feed at most. */
function stop() {
  runs += 1;
  clearTimeout(restartTimer);
  restartTimer = 0;
  feed?.close();
  feed = null;
  behind = 0;
}

async function start() {
  stop();
  const run = runs;
  try {
    const answer = await get("numbers");
    const body = await answer.json();
    if (run !== runs || answer.status === 401) return;
    if (!answer.ok) {
      show("disconnected", `not ready: ${body.detail}`);
      restart();
      return;
    }
    numbers = body.numbers.reverse();
    times = numbers.map(({ published_at: time }) => Date.parse(time));
    lastSeq = body.last_seq;
    element("access").hidden = true;
    // A link sends no token.
    for (const link of document.querySelectorAll("a.data")) link.hidden = token !== "";
    draw();
    // The tag is W/"<stream>-<last sequence>"; a proxy may have taken it away.
    follow(answer.headers.get("etag")?.split('"')[1]?.split("-")[0]);
  } catch {
    if (run === runs) lost();
  }
}

/** Not all tabs at once: somewhere within three seconds. */
function restart() {
  stop();
  restartTimer = setTimeout(start, 500 + Math.random() * 2500);
}

function lost() {
  show("disconnected", "disconnected: trying again");
  restart();
}

function follow(stream) {
  const query = new URLSearchParams({ after: lastSeq });
  if (stream) query.set("stream", stream);
  if (token) query.set("access_token", token);
  feed = new EventSource(`numbers/live?${query}`);
  feed.onopen = () => show("live", "live");
  feed.addEventListener("number", (event) => {
    const number = JSON.parse(event.data);
    if (number.seq <= lastSeq) return;
    lastSeq = number.seq;
    numbers.push(number);
    times.push(Date.parse(number.published_at));
    numbers.splice(0, numbers.length - KEEP);
    show("live", "live");
    draw();
  });
  feed.addEventListener("reset", start);
  feed.addEventListener("shutdown", restart);
  feed.addEventListener("expired", start);
  feed.onerror = lost;
}

/** What the feed cannot say: whether the gateway is well, and who is alive. */
async function poll() {
  try {
    if (!element("access").hidden) return;
    const ready = await get("readyz");
    const body = await ready.json();
    if (!ready.ok) {
      show("stale", `stale: ${body.detail}`);
    } else if (feed?.readyState === EventSource.OPEN) {
      const newest = numbers.at(-1);
      const quiet = newest && serverNow() - Date.parse(newest.published_at) > QUIET_MS;
      show(quiet ? "stale" : "live", quiet ? "no new numbers" : "live");
      // A connection that was cut without a word brings nothing any more.
      behind = body.last_seq > lastSeq ? behind + 1 : 0;
      if (behind > 5) restart();
    }
    const list = await get("replicas");
    if (list.ok) drawReplicas(await list.json());
    failures = 0;
  } catch {
    // One answer may get lost; the feed says when it is cut.
    failures += 1;
    if (failures > 1 && !restartTimer) lost();
  } finally {
    drawRate();
    setTimeout(poll, POLL_MS);
  }
}

// ---- access

function askForToken() {
  stop();
  element("refused").textContent = token ? "That token is not accepted." : "";
  element("access").hidden = false;
  show("disconnected", "a token is needed");
}

element("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = element("token").value.trim();
  sessionStorage.setItem("token", token);
  start();
});

// ---- drawing

function factors(number) {
  return [
    make("span", { class: "even" }, decimal.format(number.even)),
    " × ",
    make("span", { class: "odd" }, decimal.format(number.odd)),
  ];
}

function row(number) {
  const time = clock.format(Date.parse(number.published_at));
  return make(
    "tr",
    {},
    make("td", {}, ...factors(number)),
    make("td", {}, decimal.format(number.number)),
    make("td", {}, make("time", { datetime: number.published_at }, time)),
    make("td", {}, decimal.format(number.seq)),
  );
}

function draw() {
  element("total").textContent = decimal.format(lastSeq);
  element("list").replaceChildren(...numbers.toReversed().map(row));
  drawChart();
  drawRate();
  const newest = numbers.at(-1);
  element("latest").textContent = newest ? decimal.format(newest.number) : "–";
  element("factors").replaceChildren(...(newest ? factors(newest) : ["nothing was published yet"]));
}

/** A bar for each of the last 100, from 0 to the greatest product there can be. */
function drawChart() {
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const width = 400 / KEEP;
  const left = 400 - numbers.length * width;
  const bars = numbers.map(({ number }, at) => {
    const height = (number / GREATEST) * 100;
    return svg("rect", { x: left + at * width, y: 100 - height, width: width * 0.75, height });
  });
  const threshold = 100 - (THRESHOLD / GREATEST) * 100;
  const line = svg("line", { x1: 0, x2: 400, y1: threshold, y2: threshold });
  const chart = element("chart");
  chart.replaceChildren(line, ...bars);
  const values = numbers.map(({ number }) => number);
  const [least, most] = [Math.min(...values), Math.max(...values)].map((n) => decimal.format(n));
  const label = `${count(values.length, "number")}, from ${least} to ${most}`;
  chart.setAttribute("aria-label", values.length ? label : "No numbers yet");
}

/** What was published in the last minute, or since the oldest time that is known. */
function drawRate() {
  const now = serverNow();
  while (times[1] < now - MINUTE_MS) times.shift();
  const seconds = Math.floor((now - times[0]) / 1000);
  const recent = times.filter((time) => time >= now - MINUTE_MS).length;
  element("span").textContent = seconds < 60 ? `in the last ${Math.max(seconds, 1)}\u00a0s` : "in the last minute";
  element("rate").textContent = times.length ? decimal.format(recent) : "–";
}

function drawReplicas({ replicas: listed, latest_tick: tick }) {
  const now = Date.now();
  for (const replica of listed) replicas.set(replica.id, { ...replica, at: now });
  for (const [id, { at }] of replicas) if (now - at > SHOW_LOST_MS) replicas.delete(id);
  const services = Map.groupBy(
    [...replicas.values()].sort((a, b) => a.started.localeCompare(b.started)),
    ({ service }) => service,
  );
  const known = ["even", "odd", "multiplier", "gateway"];
  const others = [...services.keys()].filter((name) => !known.includes(name));
  const groups = [...known, ...others].map((name) => {
    const all = services.get(name) ?? [];
    const alive = all.filter(({ at }) => at === now).length;
    const items = all.map((replica) => {
      const lost = replica.at !== now;
      const ticked = !lost && replica.id === tick?.multiplier;
      const kind = lost ? "lost" : ticked ? "ticked" : "alive";
      const attributes = { class: kind, title: `${replica.id}, since ${replica.started}` };
      return make(
        "li",
        attributes,
        make("span", {}, `…${replica.id.slice(-6)}`),
        make("small", {}, lost ? "lost" : count(replica.requests, WORK[name] ?? "request")),
        make("small", {}, `${decimal.format(replica.errors)} failed`),
        // Hidden if it is another's, so that nothing moves.
        make("small", { class: "tick" }, "latest tick"),
      );
    });
    const title = make("h3", {}, `${name}: ${alive} alive`);
    return make("div", { "data-service": name, "data-alive": alive }, title, make("ul", {}, ...items));
  });
  element("replicas").replaceChildren(...groups);
}

element("expected").textContent = decimal.format(Math.round(TICKS_A_MINUTE * publishProbability()));
start();
poll();
