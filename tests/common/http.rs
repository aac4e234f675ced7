//! Servers on 127.0.0.1 for tests: HTTP as a test says, and TCP that passes through.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// A request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// With what follows the question mark.
    pub(crate) path: String,
    /// Names in lower case.
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(key, _)| key == name);
        found.next().map(|(_, value)| value.as_str())
    }
}

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// How much of the body is sent before the connection ends.
    pub(crate) sent: usize,
}

impl Answer {
    pub(crate) fn new(status: u16, body: &[u8]) -> Self {
        let (headers, sent) = (Vec::new(), usize::MAX);
        Self {
            status,
            headers,
            body: body.to_vec(),
            sent,
        }
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A server, and what it was asked for.
pub(crate) struct Server {
    pub(crate) port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Has `answer` answer each request, on a connection of its own.
    pub(crate) fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let port = listen(move |stream| {
            let Some(request) = read_request(&stream) else {
                return;
            };
            log.lock().unwrap().push(request.clone());
            let answer = answer(&request);
            let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
            if !answer
                .headers
                .iter()
                .any(|(name, _)| name == "Content-Length")
            {
                head += &format!("Content-Length: {}\r\n", answer.body.len());
            }
            for (name, value) in &answer.headers {
                head += &format!("{name}: {value}\r\n");
            }
            let sent = answer.body.len().min(answer.sent);
            // The client may have gone.
            _ = (&stream).write_all(&[head.as_bytes(), b"\r\n", &answer.body[..sent]].concat());
        });
        Self { port, requests }
    }

    /// What it was asked for so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

/// A port of 127.0.0.1 that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Has each connection handled in a thread. Returns the port.
pub(crate) fn listen(handle: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let handle = Arc::new(handle);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let handle = Arc::clone(&handle);
            thread::spawn(move || handle(stream));
        }
    });
    port
}

/// The head of a request; a body is not expected.
pub(crate) fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let headers = lines.take_while(|line| !line.is_empty());
    let headers = headers.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    });
    Some(Request {
        path: first.split(' ').nth(1)?.to_owned(),
        headers: headers.collect(),
    })
}

/// Connects a client with a port of 127.0.0.1, until one of them ends it, or so much has come from the port. Returns how much that
/// was.
pub(crate) fn pass(client: TcpStream, port: u16, limit: u64) -> u64 {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else {
        return 0;
    };
    let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        _ = std::io::copy(&mut &from, &mut &to);
        _ = to.shutdown(Shutdown::Write);
    });
    let passed = std::io::copy(&mut (&server).take(limit), &mut &client);
    for stream in [client, server] {
        _ = stream.shutdown(Shutdown::Both);
    }
    passed.unwrap_or(limit)
}
