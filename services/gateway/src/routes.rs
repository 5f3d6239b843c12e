//! The routes of the HTTP API, and how each request is answered.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use contract::THRESHOLD;
use runtime::connection;
use runtime::history::{MAX_BATCH, Start};
use serde::Serialize;
use tokio::time::{Instant, timeout};
use tracing::debug;
use warp::filters::BoxedFilter;
use warp::http::response::Builder;
use warp::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use warp::path::FullPath;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::encoding::prefers;
use crate::format::Format;
use crate::gateway::Gateway;
use crate::live::Feed;
use crate::problem::{Problem, Result};
use crate::query::{self, Query, digits};
use crate::snapshot::LAST;
use crate::state::STALE;

type Answer = Result<Response>;

const CSS: &str = "text/css; charset=utf-8";
const CSV: &str = "text/csv; charset=utf-8";
const EVENTS: &str = "text/event-stream";
const HTML: &str = "text/html; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";
const TEXT: &str = "text/plain; charset=utf-8";

/// The default size of a page of the history.
const PAGE: usize = 100;

/// Headers of every response, unless the response sets its own. Nothing here may be framed,
/// sniffed, or run; scripts of any origin may read everything (the Fetch standard, CORS).
const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
    (header::ACCESS_CONTROL_EXPOSE_HEADERS, "Age, ETag, Link, Retry-After"),
];
/// The page runs its own script, uses its own style, and connects to this gateway only.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

static INDEX: LazyLock<String> = LazyLock::new(|| {
    include_str!("../page/index.html").replace("{threshold}", &THRESHOLD.to_string())
});

/// The parts of a request that the handlers use.
struct Ask {
    query: Query,
    headers: HeaderMap,
}

/// All routes, as one filter that rejects nothing.
pub fn all(gateway: Arc<Gateway>) -> BoxedFilter<(Response,)> {
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    warp::method()
        .and(warp::path::full())
        .and(query)
        .and(warp::header::headers_cloned())
        .then(move |method, path, query: String, headers| {
            let ask = Ask { query: Query::parse(&query), headers };
            let gateway = gateway.clone();
            async move { respond(&gateway, method, path, ask).await }
        })
        .boxed()
}

/// Answers within the timeout, counts and logs the request, and adds the common headers.
async fn respond(gateway: &Arc<Gateway>, method: Method, path: FullPath, mut ask: Ask) -> Response {
    let begun = Instant::now();
    let answer = dispatch(gateway, &method, path.as_str(), &mut ask);
    let answer = timeout(gateway.options.request_ms, answer).await;
    let answer = answer.unwrap_or_else(|_| Err(Problem::unavailable("this took too long")));
    let mut response = answer.unwrap_or_else(Response::from);
    let (status, took) = (response.status(), begun.elapsed());
    gateway.counters.count(took, status.is_server_error());
    // Never the query: it may hold a token.
    debug!(%method, path = path.as_str(), status = status.as_u16(), ?took, "request");
    for (name, value) in HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// The routes that need no token: they contain no numbers, and a browser has no token yet when it
/// opens the page.
async fn dispatch(gateway: &Arc<Gateway>, method: &Method, path: &str, ask: &mut Ask) -> Answer {
    match *method {
        Method::GET | Method::HEAD => {}
        Method::OPTIONS => return options(),
        _ => return Err(Problem::method_not_allowed()),
    }
    match path {
        "/" => page(ask, &INDEX, HTML),
        "/page.css" => page(ask, include_str!("../page/page.css"), CSS),
        "/page.js" => page(ask, include_str!("../page/page.js"), JS),
        "/docs/" => moved("../docs"),
        "/docs" => page(ask, include_str!("../page/docs.html"), HTML),
        "/docs.css" => page(ask, include_str!("../page/docs.css"), CSS),
        "/docs.js" => page(ask, include_str!("../page/docs.js"), JS),
        "/openapi.json" => page(ask, include_str!("../openapi.json"), JSON),
        "/healthz" | "/healthz/" => page(ask, "{\"status\":\"ok\"}\n", JSON),
        "/readyz" | "/readyz/" => readyz(gateway, ask),
        // Checks the token itself, because it may be in the query.
        "/numbers/live" | "/numbers/live/" => live(gateway, ask),
        _ => guarded(gateway, path, ask).await,
    }
}

/// The routes that need a token, if this gateway requires tokens.
async fn guarded(gateway: &Gateway, path: &str, ask: &mut Ask) -> Answer {
    gateway.options.access.check(&ask.headers, None)?;
    match path {
        "/numbers" => numbers(gateway, ask).await,
        "/history" | "/history/" => history(gateway, ask).await,
        "/history.ndjson" => export(gateway, ask, Format::Lines, "numbers.ndjson").await,
        "/history.csv" => export(gateway, ask, Format::Csv, "numbers.csv").await,
        "/replicas" | "/replicas/" => replicas(gateway, ask),
        _ => match path.strip_prefix("/numbers/") {
            Some(seq) => number(gateway, ask, seq).await,
            None => Err(Problem::not_found(format!("there is nothing at {path}; see /docs"))),
        },
    }
}

async fn numbers(gateway: &Gateway, ask: &mut Ask) -> Answer {
    let limit = ask.query.number("limit", 1..=LAST)?.unwrap_or(LAST);
    ask.query.end()?;
    let mut snapshot = gateway.state.snapshot()?;
    let seen = seen_tags(&ask.headers);
    let sequence = |tag: &&str| digits(tag.strip_prefix(&*snapshot.stream)?.strip_prefix('-')?);
    let sequences = seen.iter().filter_map(sequence);
    if let Some(seq) = sequences.max() {
        snapshot = gateway.state.snapshot_with(seq).await?;
    }
    let head = fresh(gateway.state.age()).header(header::VARY, "Accept, Accept-Encoding");
    if prefers(&ask.headers, "text/plain", JSON) {
        // Without an `ETag`: a cache must not confuse the two formats.
        return answer(head, TEXT, snapshot.text(limit));
    }
    let mut head = head.header(header::ETAG, format!("W/\"{}\"", snapshot.tag));
    if seen.iter().any(|tag| *tag == "*" || *tag == snapshot.tag) {
        return Ok(head.status(StatusCode::NOT_MODIFIED).body("").into_response());
    }
    let (body, coding) = snapshot.json(limit, &ask.headers);
    if let Some(name) = coding {
        head = head.header(header::CONTENT_ENCODING, name);
    }
    answer(head, JSON, body)
}

/// The opaque parts of the entity tags in `If-None-Match`. Only these are compared (RFC 9110,
/// section 8.8.3.2).
fn seen_tags(headers: &HeaderMap) -> Vec<&str> {
    let values = headers.get_all(header::IF_NONE_MATCH).iter();
    let tags = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    tags.map(|tag| tag.trim().trim_start_matches("W/").trim_matches('"')).collect()
}

async fn number(gateway: &Gateway, ask: &mut Ask, seq: &str) -> Answer {
    ask.query.end()?;
    let seq = query::number("a sequence", seq, 1..=u64::MAX)?;
    let snapshot = gateway.state.snapshot_with(seq).await?;
    let (last_seq, age) = (snapshot.last_seq, gateway.state.age());
    if seq > last_seq && age >= STALE {
        return Err(Problem::unavailable("the history does not answer; it may be there by now"));
    }
    if seq > last_seq {
        let detail = format!("nothing was published as {seq} yet; the last sequence is {last_seq}");
        return Err(Problem::not_found(detail));
    }
    let page = gateway.history.page(&snapshot, Start::Sequence(seq), 1).await?;
    match page.numbers.first() {
        Some(record) if record.seq == seq => answer(fresh(age), JSON, json(record)),
        _ => Err(Problem::not_found(format!("what was stored as {seq} is not a valid number"))),
    }
}

/// The `after` or `from` of a query; by default the beginning of the history.
fn start(query: &mut Query) -> Result<Start> {
    match (query.number("after", 0..=u64::MAX)?, query.time("from")?) {
        (Some(_), Some(_)) => Err(Problem::bad_request("give either after or from, not both")),
        (None, Some(time)) => Ok(Start::Time(time)),
        (after, None) => Ok(Start::Sequence(after.unwrap_or(0).saturating_add(1))),
    }
}

async fn history(gateway: &Gateway, ask: &mut Ask) -> Answer {
    let start = start(&mut ask.query)?;
    let limit = ask.query.number("limit", 1..=MAX_BATCH)?.unwrap_or(PAGE);
    ask.query.end()?;
    let snapshot = match start {
        Start::Sequence(seq) => gateway.state.snapshot_with(seq - 1).await?,
        Start::Time(_) => gateway.state.snapshot()?,
    };
    let page = gateway.history.page(&snapshot, start, limit).await?;
    let mut head = fresh(gateway.state.age());
    if let Some(next) = page.next {
        let link = format!("<?after={next}&limit={limit}>; rel=\"next\"");
        head = head.header(header::LINK, link);
    }
    answer(head, JSON, json(&page))
}

async fn export(gateway: &Gateway, ask: &mut Ask, format: Format, file: &str) -> Answer {
    let start = start(&mut ask.query)?;
    let until = ask.query.time("until")?;
    ask.query.end()?;
    let snapshot = gateway.state.snapshot()?;
    let content_type = if format == Format::Csv { CSV } else { LINES };
    let disposition = format!("attachment; filename=\"{file}\"");
    let history = gateway.history.export(&snapshot, start, until, format).await?;
    let head = no_store().header(header::CONTENT_DISPOSITION, disposition);
    answer(head, content_type, warp::reply::stream(history).into_response().into_body())
}

fn live(gateway: &Arc<Gateway>, ask: &mut Ask) -> Answer {
    let token = ask.query.text("access_token")?;
    let expires = gateway.options.access.check(&ask.headers, token.as_deref())?;
    let mut after = ask.query.number("after", 0..=u64::MAX)?;
    let stream = ask.query.text("stream")?;
    // A client that comes back asks for the same address, and says in a header, or in a parameter
    // of one of these names, how far it got.
    let header = ask.headers.get("last-event-id").map(|id| id.to_str().unwrap_or("?").to_owned());
    let mut ids = vec![header];
    for name in ["lastEventId", "lastEventID", "last-event-id", "Last-Event-ID"] {
        ids.push(ask.query.text(name)?);
    }
    ask.query.end()?;
    if let Some(id) = ids.into_iter().flatten().find(|id| !id.is_empty()) {
        after = Some(query::number("Last-Event-ID", &id, 0..=u64::MAX)?);
    }
    let lines = prefers(&ask.headers, LINES, EVENTS);
    let (format, content_type) =
        if lines { (Format::Lines, LINES) } else { (Format::Events, EVENTS) };
    let snapshot = gateway.state.snapshot()?;
    let full = "as many event streams are open as this gateway allows";
    let permit = gateway.event_streams.clone().try_acquire_owned();
    let permit = permit.map_err(|_| Problem::unavailable(full))?;
    let feed = Feed {
        gateway: gateway.clone(),
        snapshots: gateway.state.latest.subscribe(),
        format,
        expires,
        stream: stream.unwrap_or_else(|| snapshot.stream.clone()),
        position: after.unwrap_or(snapshot.last_seq),
        _permit: permit,
    };
    // nginx would otherwise buffer the feed.
    let head = no_store().header(header::VARY, "Accept").header("x-accel-buffering", "no");
    answer(head, content_type, warp::reply::stream(feed.body()).into_response().into_body())
}

fn replicas(gateway: &Gateway, ask: &mut Ask) -> Answer {
    ask.query.end()?;
    match &*gateway.replicas.borrow() {
        Some((body, made)) => answer(fresh(made.elapsed()), JSON, body.clone()),
        None => Err(Problem::unavailable("the replicas were not heard yet")),
    }
}

fn readyz(gateway: &Gateway, ask: &mut Ask) -> Answer {
    ask.query.end()?;
    if gateway.shutdown.has_begun() {
        // HAProxy sends no new clients, and lets present ones finish (disable-on-404). For other
        // load balancers this is as good as 503.
        return Err(Problem::not_found("this gateway stops"));
    }
    if !connection::is_connected(&gateway.client) {
        return Err(Problem::unavailable("not connected to NATS"));
    }
    let last_seq = gateway.state.snapshot()?.last_seq;
    if gateway.state.age() >= STALE {
        return Err(Problem::unavailable("the history does not answer"));
    }
    let body = format!("{{\"last_seq\":{last_seq},\"status\":\"ready\"}}\n");
    answer(fresh(Duration::ZERO), JSON, body)
}

/// What scripts of other origins may do, and how long a browser may cache that.
fn options() -> Answer {
    let headers = "Accept, Authorization, Cache-Control, Content-Type, If-None-Match, \
        Last-Event-ID, Pragma, X-Requested-With";
    let head = Builder::new()
        .status(StatusCode::NO_CONTENT)
        .header(header::ALLOW, "GET, HEAD, OPTIONS")
        .header(header::ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD")
        .header(header::ACCESS_CONTROL_ALLOW_HEADERS, headers)
        .header(header::ACCESS_CONTROL_MAX_AGE, "86400");
    Ok(head.body("").into_response())
}

/// People type a slash at the end. The links of a page are relative, so it has one address.
fn moved(location: &'static str) -> Answer {
    let head = no_store().status(StatusCode::PERMANENT_REDIRECT).header(header::LOCATION, location);
    Ok(head.body("").into_response())
}

fn page(ask: &mut Ask, content: &'static str, content_type: &'static str) -> Answer {
    ask.query.end()?;
    let head = fresh(Duration::ZERO).header(header::CONTENT_SECURITY_POLICY, PAGE_POLICY);
    answer(head, content_type, content)
}

/// The head of a response that caches must revalidate. If the gateway has lost the broker, it tells
/// the age of the data in seconds (RFC 9111, section 5.1).
fn fresh(age: Duration) -> Builder {
    let head = Builder::new().header(header::CACHE_CONTROL, "no-cache");
    if age >= STALE { head.header(header::AGE, age.as_secs()) } else { head }
}

fn no_store() -> Builder {
    Builder::new().header(header::CACHE_CONTROL, "no-store")
}

fn answer<T>(head: Builder, content_type: &'static str, body: T) -> Answer
where
    warp::http::Response<T>: Reply,
{
    Ok(head.header(header::CONTENT_TYPE, content_type).body(body).into_response())
}

/// For values that always serialise.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default() + "\n"
}
