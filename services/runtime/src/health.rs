//! Health checks for containers: the page `/healthz`, and the subcommand `healthcheck` that
//! requests it.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use async_nats::Client;
use clap::Args;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::{connection, telemetry};

/// How long a request and its response may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// For services without an HTTP API of their own.
#[derive(Args, Clone, Copy, Debug)]
pub struct HealthSettings {
    /// Answer `GET /healthz` on this address: 200, or 503 without a connection to NATS
    #[arg(long, env = "EVENODD_HEALTH", value_name = "ADDRESS:PORT")]
    pub health: Option<SocketAddr>,
}

/// Listens on the address, if there is one. Connections queue until [`serve`] runs.
pub(crate) async fn listen(address: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; choose another address with --health")
    })?;
    Ok(Some(listener))
}

/// Answers one request at a time, for as long as the service runs.
pub(crate) async fn serve(listener: Option<TcpListener>, client: Client) -> Infallible {
    let Some(listener) = listener else { return std::future::pending().await };
    let answer = service_fn(async |_| {
        let (status, text) = match connection::is_connected(&client) {
            true => (StatusCode::OK, "ok\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "not connected to NATS\n"),
        };
        Response::builder().status(status).body(text.to_owned())
    });
    let mut builder = http1::Builder::new();
    builder.keep_alive(false).timer(TokioTimer::new());
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(TIMEOUT).await;
            continue;
        };
        let connection = builder.serve_connection(TokioIo::new(stream), &answer);
        // An error or a timeout concerns only this connection.
        let _ = tokio::time::timeout(TIMEOUT, connection).await;
    }
}

/// Runs `healthcheck`: prints the response, and returns status 0 if it was a 200 and 1 otherwise.
pub(crate) fn check(page: Option<(SocketAddr, &'static str)>) -> ExitCode {
    let answer = page.context("there is no health page to request: set --health").and_then(ask);
    let (status, text) = match answer {
        Ok(text) => (ExitCode::SUCCESS, text),
        Err(error) => (ExitCode::FAILURE, format!("{error:#}")),
    };
    // `docker inspect` shows this output.
    if let Err(error) = telemetry::print(text) {
        let _ = writeln!(std::io::stderr(), "error: {error}");
        return ExitCode::FAILURE;
    }
    status
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
