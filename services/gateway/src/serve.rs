//! The loop over connections. `warp::serve` has no timer: it would keep a client that never sends
//! its request for ever (docs/adr/0005-a-serve-loop-of-our-own.md).

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::gateway::Gateway;
use crate::problem::Problem;
use crate::routes;

/// The size of a connection's send buffer in the kernel, which doubles the number. It bounds what a
/// client that does not read can hold.
const SEND_BUFFER: usize = 64 * 1024;

/// The pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// Raises the soft limit of open files to what the connections need, as far as the hard limit
/// allows.
pub fn raise_file_limit(connections: u32) {
    // The connection to the broker, the log, the listener and the runtime need some as well.
    let wanted = u64::from(connections) + 64;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let limit = soft.max(wanted.min(hard));
    if setrlimit(Resource::RLIMIT_NOFILE, limit, hard).is_err() || limit < wanted {
        let what = "fewer connections fit than --max-connections allows: see ulimit -n";
        warn!(hard, connections, "{what}");
    }
}

/// Bounds how much a client that does not read can hold, and for how long. Connections inherit this
/// from the listener.
fn bound_sending(listener: &TcpListener, stall: Duration) {
    let socket = SockRef::from(listener);
    let buffer = socket.set_send_buffer_size(SEND_BUFFER);
    #[cfg(target_os = "linux")]
    let buffer = buffer.and_then(|()| socket.set_tcp_user_timeout(Some(stall)));
    if let Err(error) = buffer {
        warn!(%error, "clients that do not read are not bounded");
    }
}

/// What is wrong with a request that hyper lets pass, if anything.
fn fault(request: &Request<Incoming>) -> Option<&'static str> {
    // CONNECT, for instance. warp's filters panic without a path.
    if request.uri().path_and_query().is_none() {
        return Some("the request names no path");
    }
    // RFC 9112, section 3.2.
    let mut hosts = request.headers().get_all(HOST).iter();
    let is_right = match (hosts.next(), hosts.next()) {
        (None, _) => request.version() < Version::HTTP_11,
        (Some(host), None) => host.is_empty() || is_host(host.as_bytes()),
        (Some(_), Some(_)) => false,
    };
    (!is_right).then_some("a request has one Host header, with the name of a host")
}

/// Whether this is a host, with or without a port.
fn is_host(text: &[u8]) -> bool {
    Authority::try_from(text).is_ok_and(|authority| {
        let port = authority.as_str().strip_prefix(authority.host());
        port.is_some_and(|port| port.trim_start_matches(':').bytes().all(|b| b.is_ascii_digit()))
    })
}

/// Serves until the gateway closes, then lets open requests finish by the deadline of its shutdown.
pub async fn serve(listener: TcpListener, gateway: Arc<Gateway>) {
    let Gateway { options, shutdown, closing, .. } = &*gateway;
    let permits = Arc::new(Semaphore::new(options.max_connections as usize));
    let open = GracefulShutdown::new();
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        // A client may shut down its side after the request, and still waits for the response.
        .half_close(true)
        .header_read_timeout(options.header_ms)
        .max_buf_size(options.header_bytes as usize);
    bound_sending(&listener, options.request_ms);
    let filters = TowerToHyperService::new(warp::service(routes::all(gateway.clone())));
    let service = service_fn(move |request: Request<Incoming>| {
        let filters = filters.clone();
        async move {
            match fault(&request) {
                Some(fault) => Ok(Problem::bad_request(fault).into()),
                None => filters.call(request).await,
            }
        }
    });
    loop {
        let accept = async {
            // The semaphore is never closed.
            let permit = permits.clone().acquire_owned().await.ok();
            (listener.accept().await, permit)
        };
        let Some((accepted, permit)) = closing.run_until_cancelled(accept).await else { break };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most likely no file descriptor is left until another connection ends.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // If this fails, the connection is only slower.
        let _ = stream.set_nodelay(true);
        let connection = builder.serve_connection(TokioIo::new(stream), service.clone());
        let connection = open.watch(connection);
        tokio::spawn(async move {
            // An operator need not know of a client that is slow, gone or misbehaving.
            if let Err(error) = connection.await {
                debug!(%error, "connection");
            }
            drop(permit);
        });
    }
    drop(listener);
    let still_open = open.count();
    let deadline = shutdown.begun().await;
    if tokio::time::timeout_at(deadline, open.shutdown()).await.is_err() {
        warn!(still_open, "connections were cut at the deadline of the shutdown");
    }
}
