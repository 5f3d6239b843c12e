//! Errors as HTTP: problem documents (RFC 9457). This is the only place that makes them.

use serde_json::json;
use warp::Reply;
use warp::http::response::Builder;
use warp::http::{HeaderName, StatusCode, header};
use warp::reply::Response;

/// What a request gets, or why it fails.
pub type Result<T> = std::result::Result<T, Problem>;

/// Why a request fails. The detail is for the client.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    pub detail: String,
    header: Option<(HeaderName, &'static str)>,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), header: None }
    }

    fn with(self, name: HeaderName, value: &'static str) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    /// 400: what is wrong, and what is allowed.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 401 for a request without a token (RFC 6750, section 3).
    pub fn token_missing() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "this needs a token: Authorization: Bearer ...")
            .with(header::WWW_AUTHENTICATE, "Bearer realm=\"evenodd\"")
    }

    /// 401 for a token that is not valid. It does not say why.
    pub fn token_invalid() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "the token is not valid")
            .with(header::WWW_AUTHENTICATE, "Bearer realm=\"evenodd\", error=\"invalid_token\"")
    }

    /// 404.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// 405: everything here is for reading.
    pub fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are allowed")
            .with(header::ALLOW, "GET, HEAD, OPTIONS")
    }

    /// 429: the limit on reads of the history is reached; when to try again.
    pub fn too_many_reads(retry_after_s: &'static str) -> Self {
        let detail = "too much of the history is being read at this moment";
        Self::new(StatusCode::TOO_MANY_REQUESTS, detail).with(header::RETRY_AFTER, retry_after_s)
    }

    /// 503: not now; try again in a second.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail).with(header::RETRY_AFTER, "1")
    }
}

impl From<Problem> for Response {
    fn from(problem: Problem) -> Self {
        let body = json!({
            "type": "about:blank",
            "title": problem.status.canonical_reason(),
            "status": problem.status.as_u16(),
            "detail": problem.detail,
        });
        let mut head = Builder::new()
            .status(problem.status)
            .header(header::CONTENT_TYPE, "application/problem+json")
            .header(header::CACHE_CONTROL, "no-store");
        if let Some((name, value)) = problem.header {
            head = head.header(name, value);
        }
        head.body(format!("{body}\n")).into_response()
    }
}
