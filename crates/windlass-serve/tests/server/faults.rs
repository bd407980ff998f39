//! Clients that stall, vanish or come too many, and the end of the server.

use crate::client::read_answer;
use crate::house::{House, NAME};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::time::{Duration, Instant};
use windlass_infer::engine::EngineOptions;
use windlass_serve::ServerOptions;

fn long(stream: bool) -> String {
    let body = json!({ "model": NAME, "prompt": "the cat", "max_tokens": 480, "ignore_eos": true, "stream": stream });
    body.to_string()
}

#[test]
fn answers_of_clients_that_vanish_are_given_up() {
    let house = House::new();
    for streamed in [true, false] {
        let client = house.client();
        let mut connections = Vec::new();
        for _ in 0..4 {
            let mut connection = client.connect();
            connection
                .write_all(
                    client
                        .request("POST", "/v1/completions", &long(streamed))
                        .as_bytes(),
                )
                .unwrap();
            connections.push(connection);
        }
        if streamed {
            let mut begin = [0; 16];
            connections[0].read_exact(&mut begin).unwrap();
        }
        drop(connections);
        house.until("num_requests_running", 0.0);
        house.until("num_requests_waiting", 0.0);
        house.until("kv_cache_blocks_used", 0.0);
    }
    house.ok(
        "/v1/completions",
        &json!({ "model": NAME, "prompt": "the cat" }),
    );
}

#[test]
fn connections_that_stall_are_closed_and_keep_nobody_out() {
    let options = ServerOptions {
        header_timeout: Duration::from_millis(400),
        body_timeout: Duration::from_millis(400),
        ..ServerOptions::default()
    };
    let house = House::with(options, EngineOptions::default());
    let mut stalled = Vec::new();
    for index in 0..200 {
        let mut connection = house.client().connect();
        let text = match index % 3 {
            0 => String::new(),
            1 => "POST /v1/completions HTTP/1.1\r\nHost: h".to_owned(),
            _ => "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{\"model".to_owned(),
        };
        connection.write_all(text.as_bytes()).unwrap();
        stalled.push(connection);
    }
    house.ok(
        "/v1/completions",
        &json!({ "model": NAME, "prompt": "the cat" }),
    );
    for (index, mut connection) in stalled.into_iter().enumerate() {
        if index % 3 == 2 {
            assert_eq!(read_answer(connection).status, 408);
            continue;
        }
        // Closed, with or without a word.
        let mut rest = Vec::new();
        let _ = connection.read_to_end(&mut rest);
    }
}

#[test]
fn a_client_that_reads_nothing_is_given_up() {
    let options = ServerOptions {
        write_timeout: Duration::from_millis(300),
        ..ServerOptions::default()
    };
    let house = House::with(options, EngineOptions::default());
    let client = house.client();
    let mut connection = client.connect();
    // More than the buffers of both ends hold.
    let body = json!({ "model": NAME, "prompt": vec!["the cat"; 64], "n": 8, "max_tokens": 400, "ignore_eos": true, "stream": true, "logprobs": 20 });
    connection
        .write_all(
            client
                .request("POST", "/v1/completions", &body.to_string())
                .as_bytes(),
        )
        .unwrap();
    let start = Instant::now();
    while house.metric("num_requests_running") == 0.0 {
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    while house.metric("num_requests_running") > 0.0 {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the answers go on"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    house.until("kv_cache_blocks_used", 0.0);
}

#[test]
fn too_many_requests_are_refused_at_once() {
    let engine = EngineOptions {
        max_sequences: 1,
        max_waiting: 2,
        ..EngineOptions::default()
    };
    let house = House::with(ServerOptions::default(), engine);
    let threads: Vec<_> = (0..12)
        .map(|_| {
            let client = house.client();
            std::thread::spawn(move || client.ask("POST", "/v1/completions", &long(false)))
        })
        .collect();
    let answers: Vec<_> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    let served = answers.iter().filter(|answer| answer.status == 200).count();
    assert!(served >= 2);
    for answer in answers.iter().filter(|answer| answer.status != 200) {
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (429, &json!("queue_full"))
        );
        assert!(answer.header("retry-after").parse::<u32>().is_ok());
    }
    assert!(served < answers.len());
    assert_eq!(
        house.metric("requests_rejected_total"),
        (answers.len() - served) as f64
    );
}

#[test]
fn running_answers_are_finished_at_the_end() {
    let house = House::new();
    let client = house.client();
    let mut connections = Vec::new();
    for _ in 0..3 {
        let mut connection = client.connect();
        let request = client.request("POST", "/v1/completions", &long(true));
        connection.write_all(request.as_bytes()).unwrap();
        let mut reader = BufReader::new(connection);
        // The answer begins when the engine has taken the request.
        assert!(reader.fill_buf().unwrap().starts_with(b"HTTP/1.1 200"));
        connections.push(reader);
    }
    house.drain();
    let address = house.address;
    for connection in connections {
        let events = read_answer(connection).events();
        assert_eq!(
            events.last().unwrap()["choices"][0]["finish_reason"],
            "length"
        );
    }
    house.join().unwrap();
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn requests_have_an_end() {
    let options = ServerOptions {
        request_timeout: Duration::from_millis(1),
        ..ServerOptions::default()
    };
    let house = House::with(options, EngineOptions::default());
    let answer = house.client().ask("POST", "/v1/completions", &long(false));
    assert_eq!(answer.status, 503);
    // After the first byte an error is an event.
    let answer = house.client().ask("POST", "/v1/completions", &long(true));
    assert_eq!(answer.status, 200);
    let last = answer.events().pop().unwrap();
    assert_eq!(last["error"]["type"], "unavailable_error");
    house.until("num_requests_running", 0.0);
}
