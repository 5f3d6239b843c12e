//! Health checks for containers: the page `/healthz`, and the subcommand `healthcheck` that
//! requests it.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use async_nats::Client;
use futures::StreamExt;
use futures::stream::unfold;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::connection::{self, NOT_CONNECTED};
use crate::telemetry;

/// How long `healthcheck` waits for the response.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may take. If all are idle, the next one waits for this long, and
/// `healthcheck` still gets its response.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);
/// The most connections at once; further ones wait.
const CONNECTIONS: usize = 64;

/// Why a service that is connected to NATS cannot do its work at this moment; `None` if it can. The
/// service sets it, and the health page shows it.
pub type Health = watch::Sender<Option<&'static str>>;

/// Listens on the address that a flag gives. Connections queue until they are served.
///
/// # Errors
/// If the address cannot be used, for example because something listens on it.
pub async fn listen(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    let what = || format!("cannot listen on {address}; choose another address with {flag}");
    TcpListener::bind(address).await.with_context(what)
}

/// Answers requests for as long as the service runs, if there is a listener.
pub async fn serve(listener: Option<TcpListener>, client: Client, health: Health) {
    let Some(listener) = listener else { return std::future::pending().await };
    let answer = service_fn(async |_| {
        let is_connected = connection::is_connected(&client);
        let fault = if is_connected { *health.borrow() } else { Some(NOT_CONNECTED) };
        let (status, text) = match fault {
            None => (StatusCode::OK, "ok"),
            Some(fault) => (StatusCode::SERVICE_UNAVAILABLE, fault),
        };
        Response::builder().status(status).body(format!("{text}\n"))
    });
    let mut builder = http1::Builder::new();
    builder.keep_alive(false).half_close(true).timer(TokioTimer::new());
    let connections = unfold((), async |()| Some((listener.accept().await, ())));
    let answer = async |accepted| match accepted {
        Ok((stream, _)) => {
            let connection = builder.serve_connection(TokioIo::new(stream), &answer);
            // An error or a timeout concerns only this connection.
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
        }
        Err(_) => sleep(CONNECTION_TIMEOUT).await,
    };
    connections.for_each_concurrent(CONNECTIONS, answer).await;
}

/// Runs `healthcheck`: prints the response, which `docker inspect` shows, and returns status 0 if it
/// was a 200 and 1 otherwise.
pub(crate) fn check(page: Option<(SocketAddr, &'static str)>) -> ExitCode {
    let page = page.context("there is no health page to request: set --health");
    let Err(error) = page.and_then(ask).and_then(|text| Ok(telemetry::print(text)?)) else {
        return ExitCode::SUCCESS;
    };
    let _ = writeln!(std::io::stderr(), "{error:#}");
    ExitCode::FAILURE
}

/// Requests a page, and returns its body if the status is 200. The body of any other response
/// becomes the error.
fn ask((mut address, path): (SocketAddr, &'static str)) -> anyhow::Result<String> {
    if address.ip().is_unspecified() {
        address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let asked = || {
        let mut stream = std::net::TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    let answer = asked().with_context(|| format!("http://{address}{path}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, &answer));
    anyhow::ensure!(head.split(' ').nth(1) == Some("200"), "{}", body.trim_end());
    Ok(body.trim_end().to_owned())
}
