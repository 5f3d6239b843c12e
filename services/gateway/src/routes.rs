//! What is answered to which request. Every answer comes from memory.

use std::sync::Arc;
use std::time::Instant;

use async_nats::Client;
use bytes::Bytes;
use runtime::connection;
use runtime::micro::Counters;
use serde_json::json;
use warp::filters::BoxedFilter;
use warp::http::{HeaderMap, HeaderValue, Method, header};
use warp::path::FullPath;
use warp::reply::Response;
use warp::{Filter, Rejection};

use crate::problem::Problem;
use crate::snapshot::{LAST, State};

/// What handlers look at of a request.
#[derive(Debug)]
struct Ask {
    method: Method,
    query: Option<String>,
    headers: HeaderMap,
}

/// All routes. What no route takes is answered here too: nothing is rejected.
pub fn all(state: Arc<State>, client: Client, counters: Arc<Counters>) -> BoxedFilter<(Response,)> {
    let numbers = {
        let state = state.clone();
        route("numbers", move |ask| numbers(&state, ask))
    };
    let healthz = route("healthz", |_| Ok(plain_json(&json!({ "status": "ok" }))));
    let readyz = route("readyz", move |_| {
        ready(&state, connection::is_connected(&client))
    });
    let nowhere = warp::path::full().map(|path: FullPath| {
        let detail = format!("there is nothing at {}; try /numbers", path.as_str());
        Response::from(Problem::not_found(detail))
    });
    let begun = warp::any().map(Instant::now);
    begun
        .and(
            numbers
                .or(healthz)
                .unify()
                .or(readyz)
                .unify()
                .or(nowhere)
                .unify(),
        )
        .map(move |begun: Instant, response: Response| {
            counters.count(begun.elapsed(), response.status().is_server_error());
            response
        })
        .boxed()
}

/// A route for GET and HEAD at one path.
fn route(
    path: &'static str,
    answer: impl Fn(&Ask) -> Result<Response, Problem> + Clone + Send + Sync + 'static,
) -> impl Filter<Extract = (Response,), Error = Rejection> + Clone + Send + Sync + 'static {
    let query = warp::query::raw()
        .map(Some)
        .or(warp::any().map(|| None))
        .unify();
    warp::path(path)
        .and(warp::path::end())
        .and(warp::method())
        .and(query)
        .and(warp::header::headers_cloned())
        .map(move |method, query, headers| {
            let ask = Ask {
                method,
                query,
                headers,
            };
            match ask.method {
                Method::GET | Method::HEAD => answer(&ask),
                _ => Err(Problem::method_not_allowed()),
            }
            .unwrap_or_else(Response::from)
        })
}

fn numbers(state: &State, ask: &Ask) -> Result<Response, Problem> {
    let limit = limit(ask.query.as_deref())?;
    let snapshot = state
        .snapshot()
        .ok_or_else(|| Problem::unavailable("the history was not read yet; see /readyz"))?;
    let (body, content_type) = if wants_text(&ask.headers) {
        (snapshot.text(limit), "text/plain; charset=utf-8")
    } else {
        (snapshot.json(limit), "application/json")
    };
    let mut response = answer(body, content_type);
    let vary = HeaderValue::from_static("Accept");
    response.headers_mut().insert(header::VARY, vary);
    Ok(response)
}

/// The `limit` of a query: 1 to 100, by default all.
fn limit(query: Option<&str>) -> Result<usize, Problem> {
    let mut limit = LAST;
    let mut given = false;
    for pair in query
        .unwrap_or("")
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name != "limit" {
            return Err(Problem::bad_request(format!(
                "there is no parameter {name:?}; there is limit=1..{LAST}"
            )));
        }
        if std::mem::replace(&mut given, true) {
            return Err(Problem::bad_request("limit is given more than once"));
        }
        limit = value
            .parse()
            .ok()
            .filter(|limit| (1..=LAST).contains(limit))
            .ok_or_else(|| {
                Problem::bad_request(format!("limit is a number from 1 to {LAST}, not {value:?}"))
            })?;
    }
    Ok(limit)
}

/// Whether text is preferred to JSON (RFC 9110, section 12.5.1).
fn wants_text(headers: &HeaderMap) -> bool {
    quality(headers, "text", "plain") > quality(headers, "application", "json")
}

/// The weight that `Accept` gives a media type, from 0 to 1. The most specific range counts.
fn quality(headers: &HeaderMap, kind: &str, subkind: &str) -> f32 {
    let accept = headers.get_all(header::ACCEPT);
    let values = accept.iter().filter_map(|value| value.to_str().ok());
    let weights = values
        .flat_map(|value| value.split(','))
        .filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let (a, b) = parts.next()?.split_once('/')?;
            let specific = match (
                a.eq_ignore_ascii_case(kind),
                b.eq_ignore_ascii_case(subkind),
            ) {
                (true, true) => 2,
                (true, false) if b == "*" => 1,
                _ if (a, b) == ("*", "*") => 0,
                _ => return None,
            };
            let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok());
            Some((specific, weight.unwrap_or(1.0)))
        });
    weights
        .max_by_key(|&(specific, _)| specific)
        .map_or(0.0, |(_, weight)| weight)
}

fn ready(state: &State, connected: bool) -> Result<Response, Problem> {
    let Some(snapshot) = state.snapshot() else {
        return Err(Problem::unavailable("the history was not read yet"));
    };
    if !connected {
        return Err(Problem::unavailable("not connected to NATS"));
    }
    if !state.is_current() {
        return Err(Problem::unavailable("the history does not answer"));
    }
    Ok(plain_json(
        &json!({ "status": "ready", "last_seq": snapshot.last_seq }),
    ))
}

fn plain_json(value: &serde_json::Value) -> Response {
    answer(format!("{value}\n").into(), "application/json")
}

fn answer(body: Bytes, content_type: &'static str) -> Response {
    let mut response = Response::new(body.into());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_limit_is_taken_or_refused(number in 0..200usize) {
            let query = format!("limit={number}");
            let taken = limit(Some(&query)).ok();
            prop_assert_eq!(taken, (1..=100).contains(&number).then_some(number));
        }

        #[test]
        fn no_query_panics(query: String) {
            let _ = limit(Some(&query));
        }
    }

    #[test]
    fn json_unless_text_is_asked_for() {
        for (accept, text) in [
            ("text/plain", true),
            ("text/plain;q=0.9", true),
            ("text/html, text/plain", true),
            ("*/*", false),
            ("application/json, text/plain, */*", false),
            ("text/html", false),
            ("text/plain;q=0", false),
            ("text/plain, application/json;q=0", true),
            ("application/json;q=0.1, text/plain;q=0.9", true),
            ("TEXT/PLAIN", true),
            ("text/*", true),
            ("nonsense", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(wants_text(&headers), text, "{accept}");
        }
        assert!(!wants_text(&HeaderMap::new()));
    }
}
