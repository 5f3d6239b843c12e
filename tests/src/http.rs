//! A small HTTP client with one connection for each request. It uses HTTP/1.0, where a body ends
//! with its connection and needs no decoding.

use std::io;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::patience;

/// A response.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The status line and the headers, their names in lower case.
    pub head: String,
    /// The body as text.
    pub body: String,
    /// The body as bytes.
    pub bytes: Vec<u8>,
}

impl Answer {
    fn new(head: &str, bytes: Vec<u8>) -> Self {
        Self {
            status: status(head),
            head: lower_names(head),
            body: String::from_utf8_lossy(&bytes).into_owned(),
            bytes,
        }
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The value of a header, if it is present.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// The `seq` of every record in the body.
    #[must_use]
    pub fn sequences(&self) -> Vec<u64> {
        let body = self.json();
        let numbers = body["numbers"].as_array().unwrap();
        numbers.iter().map(|n| n["seq"].as_u64().unwrap()).collect()
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let name = format!("{}: ", name.to_lowercase());
    head.lines().find_map(|line| line.strip_prefix(&name))
}

/// Requests `GET path`, with further header lines such as `Accept: text/plain`.
pub async fn get(address: &str, path: &str, headers: &[&str]) -> Answer {
    request(address, "GET", path, headers).await
}

/// As [`get`], for a server that may be down.
pub async fn try_get(address: &str, path: &str) -> io::Result<Answer> {
    answer(send(address, "GET", path, &[]).await?).await
}

/// Requests `POST path` with a JSON body, from a server that supports only HTTP/1.1.
pub async fn post(address: &str, path: &str, body: &Value) -> Answer {
    let body = body.to_string();
    let length = body.len();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    // The connection may stay open, so this reads as many bytes as the length says.
    let mut reader = BufReader::new(stream);
    let head = head(&mut reader).await.unwrap();
    let length = header(&lower_names(&head), "content-length").map(|length| length.parse());
    let mut bytes = vec![0; length.expect("a length").unwrap()];
    reader.read_exact(&mut bytes).await.unwrap();
    Answer::new(&head, bytes)
}

/// Sends a request without a body.
pub async fn request(address: &str, method: &str, path: &str, headers: &[&str]) -> Answer {
    answer(send(address, method, path, headers).await.unwrap()).await.unwrap()
}

async fn answer(stream: TcpStream) -> io::Result<Answer> {
    let mut reader = BufReader::new(stream);
    let head = head(&mut reader).await?;
    let mut bytes = Vec::new();
    timeout(patience(), reader.read_to_end(&mut bytes)).await??;
    Ok(Answer::new(&head, bytes))
}

/// Reads up to the body.
async fn head(reader: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if timeout(patience(), reader.read_line(&mut head)).await?? == 0 {
            return Err(io::Error::other(format!("closed: {head}")));
        }
    }
    Ok(head)
}

async fn send(address: &str, method: &str, path: &str, headers: &[&str]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    let mut head = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\n");
    for header in headers {
        head += header;
        head += "\r\n";
    }
    stream.write_all((head + "\r\n").as_bytes()).await?;
    Ok(stream)
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Converts the names of headers to lower case, and leaves their values unchanged.
fn lower_names(head: &str) -> String {
    let lines = head.lines().map(|line| match line.split_once(':') {
        Some((name, value)) => format!("{}: {}\n", name.to_lowercase(), value.trim()),
        None => format!("{line}\n"),
    });
    lines.collect()
}

/// A response whose body is read line by line, while it arrives.
pub struct Lines {
    /// The status code.
    pub status: u16,
    /// The status line and the headers, their names in lower case.
    pub head: String,
    reader: BufReader<TcpStream>,
}

/// A server-sent event.
#[derive(Debug)]
pub struct Event {
    /// The type of the event.
    pub name: String,
    /// The position after the event.
    pub id: u64,
    /// The data of the event.
    pub data: Value,
}

impl Lines {
    /// Requests `GET path`, and reads the head of the response.
    pub async fn open(address: &str, path: &str, headers: &[&str]) -> Self {
        Self::try_open(address, path, headers).await.unwrap()
    }

    /// As [`Self::open`], for a server that may be down.
    pub async fn try_open(address: &str, path: &str, headers: &[&str]) -> io::Result<Self> {
        Self::try_over(send(address, "GET", path, headers).await?).await
    }

    /// Reads the head of the response on a connection on which the request was sent.
    pub async fn over(stream: TcpStream) -> Self {
        Self::try_over(stream).await.unwrap()
    }

    async fn try_over(stream: TcpStream) -> io::Result<Self> {
        let mut reader = BufReader::new(stream);
        let head = head(&mut reader).await?;
        Ok(Self { status: status(&head), head: lower_names(&head), reader })
    }

    /// The next line; `None` at the end.
    pub async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = timeout(patience(), self.reader.read_line(&mut line)).await;
        // A reset of the connection counts as its end.
        let read = read.expect("no line for a long time").unwrap_or(0);
        (read > 0).then(|| line.trim_end().to_owned())
    }

    /// The next event, without comments and `retry`. `None` at the end.
    pub async fn event(&mut self) -> Option<Event> {
        let (mut name, mut id, mut data) = (None, None, None);
        loop {
            let line = self.line().await?;
            match line.split_once(": ") {
                Some(("event", value)) => name = Some(value.to_owned()),
                Some(("id", value)) => id = Some(value.parse().unwrap()),
                Some(("data", value)) => data = Some(serde_json::from_str(value).unwrap()),
                _ => {}
            }
            if line.is_empty()
                && let (Some(name), Some(id), Some(data)) = (name.take(), id, data.take())
            {
                return Some(Event { name, id, data });
            }
        }
    }

    /// The sequences of the next events, which must all be records.
    pub async fn sequences(&mut self, count: usize) -> Vec<u64> {
        let mut sequences = Vec::with_capacity(count);
        while sequences.len() < count {
            let event = self.event().await.expect("the feed ended");
            assert_eq!(event.name, "number", "{event:?}");
            assert_eq!(event.data["seq"], event.id);
            sequences.push(event.id);
        }
        sequences
    }
}
