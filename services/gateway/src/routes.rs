//! What is answered to which request.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use runtime::connection;
use runtime::history::{MAX_BATCH, Start};
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use tracing::debug;
use warp::filters::BoxedFilter;
use warp::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use warp::path::FullPath;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::Gateway;
use crate::encoding::prefers;
use crate::live::{Feed, Wish};
use crate::problem::Problem;
use crate::query::{Query, digits};
use crate::snapshot::{Format, LAST, STALE, Snapshot, stream_id};

type Answer = Result<Response, Problem>;

const CSV: &str = "text/csv; charset=utf-8";
const EVENTS: &str = "text/event-stream";
const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";
const TEXT: &str = "text/plain; charset=utf-8";

/// How many numbers a page of the history has unless the client says.
const PAGE: u64 = 100;
/// How far beyond the end a sequence may be for a client to have seen it at another replica.
const AHEAD: u64 = 16;

/// On every answer, unless it has its own. Nothing here is to be framed, sniffed, or run; and
/// everything may be read by a script of any origin (the Fetch standard, CORS).
const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"),
    ),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")),
    (
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("Age, ETag, Link, Retry-After"),
    ),
];
/// The page runs its own script, has its own style, and asks this gateway alone.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What is looked at of a request.
struct Ask {
    method: Method,
    path: FullPath,
    query: String,
    headers: HeaderMap,
}

impl Ask {
    fn query(&self) -> Result<Query, Problem> {
        Query::parse(&self.query)
    }

    /// The answer to HEAD has no body; one that would be streamed is not even begun.
    fn is_head(&self) -> bool {
        self.method == Method::HEAD
    }
}

/// All routes, as one filter that rejects nothing.
pub fn all(gateway: Arc<Gateway>) -> BoxedFilter<(Response,)> {
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    warp::method()
        .and(warp::path::full())
        .and(query)
        .and(warp::header::headers_cloned())
        .then(move |method, path, query, headers| {
            let ask = Ask { method, path, query, headers };
            let gateway = gateway.clone();
            async move { respond(&gateway, &ask).await }
        })
        .boxed()
}

/// Answers within the time for it, and keeps the books.
async fn respond(gateway: &Arc<Gateway>, ask: &Ask) -> Response {
    let begun = Instant::now();
    let answer = tokio::time::timeout(gateway.request_time, dispatch(gateway, ask)).await;
    let answer = answer.unwrap_or_else(|_| Err(Problem::unavailable("this took too long")));
    let mut response = answer.unwrap_or_else(Response::from);
    let (status, took) = (response.status(), begun.elapsed());
    gateway.counters.count(took, status.is_server_error());
    // Never the query: it may hold a token.
    debug!(method = %ask.method, path = ask.path.as_str(), status = status.as_u16(), ?took, "request");
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.entry(name).or_insert(value);
    }
    response
}

async fn dispatch(gateway: &Arc<Gateway>, ask: &Ask) -> Answer {
    match ask.method {
        Method::GET | Method::HEAD => {}
        Method::OPTIONS => return Ok(options()),
        _ => return Err(Problem::method_not_allowed()),
    }
    let path = ask.path.as_str();
    // What tells nothing of the numbers is for everybody: a browser has no token yet when it opens
    // the page. The live feed looks for its token itself.
    match path {
        "/healthz" => return healthz(ask),
        "/readyz" => return readyz(gateway, ask),
        "/numbers/live" => return live(gateway, ask),
        _ => {}
    }
    if let Some((body, content_type)) = file(path) {
        ask.query()?.end()?;
        return Ok(page(body, content_type));
    }
    gateway.access.check(&ask.headers, None)?;
    match path {
        "/numbers" => numbers(gateway, ask).await,
        "/history" => history(gateway, ask).await,
        "/history.ndjson" => export(gateway, ask, Format::Lines).await,
        "/history.csv" => export(gateway, ask, Format::Csv).await,
        "/replicas" => replicas(gateway, ask),
        _ => match path.strip_prefix("/numbers/") {
            Some(seq) => number(gateway, ask, seq).await,
            None => Err(Problem::not_found(format!("there is nothing at {path}; see /docs"))),
        },
    }
}

/// What is embedded: the page, and the description of the API.
fn file(path: &str) -> Option<(&'static str, &'static str)> {
    const HTML: &str = "text/html; charset=utf-8";
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    const STYLE: &str = "text/css; charset=utf-8";
    Some(match path {
        "/" => (include_str!("../page/index.html"), HTML),
        "/page.js" => (include_str!("../page/page.js"), SCRIPT),
        "/page.css" => (include_str!("../page/page.css"), STYLE),
        "/docs" => (include_str!("../page/docs.html"), HTML),
        "/docs.css" => (include_str!("../page/docs.css"), STYLE),
        "/docs.js" => (include_str!("../page/docs.js"), SCRIPT),
        "/openapi.json" => (include_str!("../openapi.json"), JSON),
        _ => return None,
    })
}

async fn numbers(gateway: &Gateway, ask: &Ask) -> Answer {
    let mut query = ask.query()?;
    let limit = query.number("limit", 1..=LAST as u64)?;
    query.end()?;
    let limit = limit.and_then(|limit| limit.try_into().ok()).unwrap_or(LAST);
    let mut snapshot = gateway.snapshot()?;
    let seen: Vec<&str> = ask
        .headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    if let Some(seq) = seen_sequence(&snapshot, &seen)
        && seq > snapshot.last_seq
    {
        snapshot = gateway.snapshot_with(seq).await?;
    }
    let mut response = if prefers(&ask.headers, "text/plain", JSON) {
        // Without a tag: a cache must not take one form for the other.
        answer(snapshot.text(limit), TEXT)
    } else if matches(&snapshot, &seen) {
        let mut response = Response::default();
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response.headers_mut().insert(header::ETAG, snapshot.etag.clone());
        response
    } else {
        let (body, coding) = snapshot.json(limit, &ask.headers);
        let mut response = answer(body, JSON);
        if let Some(name) = coding {
            set(&mut response, header::CONTENT_ENCODING, name);
        }
        response.headers_mut().insert(header::ETAG, snapshot.etag.clone());
        response
    };
    set(&mut response, header::CACHE_CONTROL, "no-cache");
    set(&mut response, header::VARY, "Accept, Accept-Encoding");
    Ok(aged(response, gateway.state.age()))
}

/// What is compared of a tag (RFC 9110, section 8.8.3.2).
fn opaque(tag: &str) -> &str {
    tag.trim_start_matches("W/").trim_matches('"')
}

/// Whether one of the tags of `If-None-Match` is that of the snapshot.
fn matches(snapshot: &Snapshot, seen: &[&str]) -> bool {
    let own = opaque(snapshot.etag.to_str().unwrap_or_default());
    seen.iter().any(|tag| *tag == "*" || opaque(tag) == own)
}

/// The latest sequence of this stream that a client has seen, by the tags it has.
fn seen_sequence(snapshot: &Snapshot, seen: &[&str]) -> Option<u64> {
    let sequences = seen.iter().filter_map(|tag| {
        let (stream, seq) = opaque(tag).split_once('-')?;
        (stream == stream_id(snapshot.created)).then(|| digits(seq))?
    });
    sequences.max()
}

async fn number(gateway: &Gateway, ask: &Ask, seq: &str) -> Answer {
    ask.query()?.end()?;
    let seq = digits(seq).filter(|seq| *seq > 0).ok_or_else(|| {
        Problem::bad_request(format!("a sequence is a number from 1 to {}, not {seq:?}", u64::MAX))
    })?;
    let snapshot = gateway.snapshot_near(seq).await?;
    let last_seq = snapshot.last_seq;
    if seq > last_seq && !gateway.state.is_current() {
        return Err(Problem::unavailable("the history does not answer; it may be there by now"));
    }
    if seq > last_seq {
        let detail = format!("nothing was published as {seq} yet; the last sequence is {last_seq}");
        return Err(Problem::not_found(detail));
    }
    let page = gateway.history.page(&snapshot, Start::Sequence(seq), 1).await?;
    let number = page.numbers.first().filter(|number| number.seq == seq).ok_or_else(|| {
        Problem::not_found(format!("what was stored as {seq} is not a valid number"))
    })?;
    Ok(aged(answer(Format::Lines.all([number]).into(), JSON), gateway.state.age()))
}

/// `after` or `from` of a query; by default the beginning.
fn start(query: &mut Query) -> Result<Start, Problem> {
    match (query.number("after", 0..=u64::MAX)?, query.time("from")?) {
        (Some(_), Some(_)) => Err(Problem::bad_request("give either after or from, not both")),
        (None, Some(time)) => Ok(Start::Time(time)),
        (after, None) => Ok(Start::Sequence(after.unwrap_or(0).saturating_add(1))),
    }
}

async fn history(gateway: &Gateway, ask: &Ask) -> Answer {
    let mut query = ask.query()?;
    let start = start(&mut query)?;
    let limit = query.number("limit", 1..=MAX_BATCH as u64)?.unwrap_or(PAGE);
    query.end()?;
    let snapshot = match start {
        Start::Sequence(seq) => gateway.snapshot_near(seq - 1).await?,
        Start::Time(_) => gateway.snapshot()?,
    };
    let count = limit.try_into().unwrap_or(MAX_BATCH);
    let page = gateway.history.page(&snapshot, start, count).await?;
    let mut response = json_answer(&page);
    if let Some(next) = page.next {
        let link = format!("</history?after={next}&limit={limit}>; rel=\"next\"");
        // Digits and ASCII: always a valid header.
        if let Ok(link) = HeaderValue::from_str(&link) {
            response.headers_mut().insert(header::LINK, link);
        }
    }
    Ok(aged(response, gateway.state.age()))
}

async fn export(gateway: &Gateway, ask: &Ask, format: Format) -> Answer {
    let mut query = ask.query()?;
    let start = start(&mut query)?;
    let until = query.time("until")?;
    query.end()?;
    let snapshot = gateway.snapshot()?;
    let (content_type, disposition) = match format {
        Format::Csv => (CSV, "attachment; filename=\"numbers.csv\""),
        _ => (LINES, "attachment; filename=\"numbers.ndjson\""),
    };
    let mut response = if ask.is_head() {
        Response::default()
    } else {
        let history = gateway.history.export(&snapshot, start, until, format).await?;
        warp::reply::stream(history).into_response()
    };
    set(&mut response, header::CONTENT_TYPE, content_type);
    set(&mut response, header::CONTENT_DISPOSITION, disposition);
    set(&mut response, header::CACHE_CONTROL, "no-store");
    Ok(response)
}

fn live(gateway: &Arc<Gateway>, ask: &Ask) -> Answer {
    let mut query = ask.query()?;
    let token = query.text("access_token")?;
    let ends = gateway.access.check(&ask.headers, token.as_deref())?;
    let after = query.number("after", 0..=u64::MAX)?;
    let stream = query.text("stream")?;
    query.end()?;
    // A browser that comes back asks for the same address, and says here how far it got.
    let last_event = match ask.headers.get("last-event-id").filter(|id| !id.is_empty()) {
        None => None,
        Some(id) => {
            let id = id.to_str().ok().and_then(digits);
            let wrong = || Problem::bad_request("Last-Event-ID is a sequence: a number from 0");
            Some(id.ok_or_else(wrong)?)
        }
    };
    let wish = Wish { after: last_event.or(after), stream };
    let format = if prefers(&ask.headers, LINES, EVENTS) { Format::Lines } else { Format::Events };
    let snapshot = gateway.snapshot()?;
    let permit = gateway.event_streams.clone().try_acquire_owned().map_err(|_| {
        Problem::unavailable("as many event streams are open as this gateway allows")
    })?;
    let mut response = if ask.is_head() {
        Response::default()
    } else {
        let feed = Feed::new(gateway.clone(), &snapshot, wish, format, ends, permit);
        warp::reply::stream(feed.stream()).into_response()
    };
    let content_type = if format == Format::Events { EVENTS } else { LINES };
    set(&mut response, header::CONTENT_TYPE, content_type);
    set(&mut response, header::CACHE_CONTROL, "no-store");
    set(&mut response, header::VARY, "Accept");
    // A proxy that buffers makes a live feed a late one.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn replicas(gateway: &Gateway, ask: &Ask) -> Answer {
    ask.query()?.end()?;
    let list = gateway.replicas.borrow().clone();
    let (body, at) = list.ok_or_else(|| Problem::unavailable("the replicas were not heard yet"))?;
    Ok(aged(answer(body, JSON), at.elapsed()))
}

fn healthz(ask: &Ask) -> Answer {
    ask.query()?.end()?;
    Ok(json_answer(&json!({ "status": "ok" })))
}

fn readyz(gateway: &Gateway, ask: &Ask) -> Answer {
    ask.query()?.end()?;
    if gateway.leaving.has_begun() {
        // To HAProxy this means: no further clients, and the present ones may finish
        // (disable-on-404). To anybody else it is as good as 503.
        return Err(Problem::not_found("this gateway stops"));
    }
    if !connection::is_connected(&gateway.client) {
        return Err(Problem::unavailable("not connected to NATS"));
    }
    let snapshot = gateway.snapshot()?;
    if !gateway.state.is_current() {
        return Err(Problem::unavailable("the history does not answer"));
    }
    Ok(json_answer(&json!({ "status": "ready", "last_seq": snapshot.last_seq })))
}

/// What scripts of other origins may do, and for how long a browser may remember it.
fn options() -> Response {
    let mut response = Response::default();
    *response.status_mut() = StatusCode::NO_CONTENT;
    set(&mut response, header::ALLOW, "GET, HEAD, OPTIONS");
    set(&mut response, header::ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD");
    let allowed = "Authorization, If-None-Match, Last-Event-ID";
    set(&mut response, header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    set(&mut response, header::ACCESS_CONTROL_MAX_AGE, "86400");
    response
}

fn page(body: &'static str, content_type: &'static str) -> Response {
    let mut response = answer(Bytes::from_static(body.as_bytes()), content_type);
    set(&mut response, header::CONTENT_SECURITY_POLICY, PAGE_POLICY);
    response
}

fn answer(body: Bytes, content_type: &'static str) -> Response {
    let mut response = Response::new(body.into());
    set(&mut response, header::CONTENT_TYPE, content_type);
    set(&mut response, header::CACHE_CONTROL, "no-cache");
    response
}

/// A value whose serialisation cannot fail.
fn json_answer(value: &impl Serialize) -> Response {
    let body = serde_json::to_string(value).unwrap_or_default();
    answer((body + "\n").into(), JSON)
}

fn set(response: &mut Response, name: HeaderName, value: &'static str) {
    response.headers_mut().insert(name, HeaderValue::from_static(value));
}

impl Gateway {
    fn snapshot(&self) -> Result<Arc<Snapshot>, Problem> {
        let snapshot = self.state.snapshot();
        snapshot.ok_or_else(|| Problem::unavailable("the history was not read yet; see /readyz"))
    }

    /// The snapshot, after a moment to catch up with what the client has seen.
    async fn snapshot_with(&self, seq: u64) -> Result<Arc<Snapshot>, Problem> {
        self.state.snapshot_with(seq).await;
        self.snapshot()
    }

    /// The same where a sequence says little about what the client has seen: only one that is
    /// just beyond the end is waited for.
    async fn snapshot_near(&self, seq: u64) -> Result<Arc<Snapshot>, Problem> {
        let snapshot = self.snapshot()?;
        let ahead = seq.saturating_sub(snapshot.last_seq);
        if (1..=AHEAD).contains(&ahead) {
            return self.snapshot_with(seq).await;
        }
        Ok(snapshot)
    }
}

/// An answer from a gateway that has lost the broker says how old it is, in seconds (RFC 9111,
/// section 5.1).
fn aged(mut response: Response, age: Duration) -> Response {
    if age >= STALE {
        response.headers_mut().insert(header::AGE, age.as_secs().into());
    }
    response
}
