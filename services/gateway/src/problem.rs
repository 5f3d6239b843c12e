//! Errors as HTTP: problem documents (RFC 9457). This is the only place that makes them.

use std::time::Duration;

use serde_json::json;
use warp::http::{HeaderName, HeaderValue, StatusCode, header};
use warp::reply::Response;

/// Why a request fails. The detail is for the client.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    pub detail: String,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), header: None }
    }

    fn with(mut self, name: HeaderName, value: impl Into<HeaderValue>) -> Self {
        self.header = Some((name, value.into()));
        self
    }

    /// 400: what is wrong, and what is allowed.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 401 for a request without a token (RFC 6750, section 3).
    pub fn token_missing() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "this needs a token: Authorization: Bearer ...")
            .with(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"evenodd\""))
    }

    /// 401 for a token that is not valid. It does not say why.
    pub fn token_invalid() -> Self {
        let challenge = "Bearer realm=\"evenodd\", error=\"invalid_token\"";
        Self::new(StatusCode::UNAUTHORIZED, "the token is not valid")
            .with(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge))
    }

    /// 404.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// 405: everything here is for reading.
    pub fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are allowed")
            .with(header::ALLOW, HeaderValue::from_static("GET, HEAD, OPTIONS"))
    }

    /// 429: the history is read as often as the broker should bear; when to try again.
    pub fn too_many_reads(wait: Duration) -> Self {
        let detail = "too much of the history is being read at this moment";
        Self::new(StatusCode::TOO_MANY_REQUESTS, detail).with(header::RETRY_AFTER, wait.as_secs())
    }

    /// 503: not now; try again in a second.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
            .with(header::RETRY_AFTER, HeaderValue::from_static("1"))
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
        let mut response = Self::new(format!("{body}\n").into());
        *response.status_mut() = problem.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.extend(problem.header);
        response
    }
}
