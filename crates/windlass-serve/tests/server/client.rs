//! A client of HTTP that shows everything and can misbehave.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    pub fn header(&self, name: &str) -> &str {
        let found = self
            .headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map_or("", |(_, value)| value)
    }

    /// The objects of an event stream. With names, each object's `type` is its name; without, the stream ends by `[DONE]`
    /// or by an error.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        assert!(text.ends_with("\n\n"), "{text}");
        let mut objects = Vec::new();
        let mut done = false;
        for event in text.trim_end().split("\n\n") {
            let mut name = None;
            for line in event.lines().filter(|line| !line.starts_with(':')) {
                assert!(!done, "after the end: {line}");
                match line.split_once(": ").unwrap() {
                    ("event", of) => name = Some(of.to_owned()),
                    ("data", "[DONE]") => done = true,
                    ("data", data) => {
                        let object: Value = serde_json::from_str(data).unwrap();
                        if let Some(name) = &name {
                            assert_eq!(object["type"], name.as_str());
                            done = [
                                "message_stop",
                                "response.completed",
                                "response.incomplete",
                                "error",
                            ]
                            .contains(&name.as_str());
                        }
                        done |= !object["error"].is_null() && name.is_none();
                        objects.push(object);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(done, "the stream has no end: {text}");
        objects
    }
}

/// Connects anew for each request.
pub struct Client {
    address: SocketAddr,
    pub headers: Vec<String>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Client {
            address,
            headers: vec!["Content-Type: application/json".into()],
        }
    }

    /// A connection that gives up waiting after a while.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    /// The text of a request.
    pub fn request(&self, method: &str, path: &str, body: &str) -> String {
        let headers = self.headers.join("\r\n");
        let length = body.len();
        format!(
            "{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n{headers}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    }

    pub fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let mut stream = self.connect();
        let request = self.request(method, path, body);
        // A server that refuses early does not read everything.
        let _ = stream.write_all(request.as_bytes());
        read_answer(stream)
    }
}

/// Reads a response to its end.
pub fn read_answer(stream: impl Read) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line
        .split(' ')
        .nth(1)
        .unwrap_or_else(|| panic!("no status: {line:?}"));
    let status = status.parse().unwrap();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None => break,
        }
    }
    let mut answer = Answer {
        status,
        headers,
        body: Vec::new(),
    };
    if answer.header("transfer-encoding") == "chunked" {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let length = usize::from_str_radix(line.trim_end(), 16).unwrap();
            let mut chunk = vec![0; length + 2];
            reader.read_exact(&mut chunk).unwrap();
            answer.body.extend_from_slice(&chunk[..length]);
            if length == 0 {
                break;
            }
        }
    } else {
        let length = answer.header("content-length").parse().unwrap_or(0);
        answer.body = vec![0; length];
        reader.read_exact(&mut answer.body).unwrap();
    }
    answer
}
