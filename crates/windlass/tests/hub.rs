//! Fetching models from a stand-in of the hub, written here over plain sockets.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use windlass::hub::{Event, Hub, HubError};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TINY: &[(&str, &str)] = &[
    ("config.json", r#"{"model_type": "llama"}"#),
    ("tokenizer.json", "{}"),
    ("generation_config.json", r#"{"eos_token_id": 2}"#),
    ("README.md", "not fetched"),
    ("pytorch_model.bin", "not fetched"),
    (
        "model.safetensors",
        "the weights, all forty bytes of them .....",
    ),
];
const SHARDED: &[(&str, &str)] = &[
    ("config.json", "{}"),
    (
        "model.safetensors.index.json",
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#,
    ),
    ("model-1.safetensors", "first shard"),
    ("model-2.safetensors", "second shard"),
];

/// How the stand-in behaves.
#[derive(Default)]
struct Behavior {
    files: HashMap<String, String>,
    /// A status instead of any answer.
    status: Option<u16>,
    /// The token without which everything is 401.
    token: Option<&'static str>,
    /// Transfers of the weights that break off after ten bytes.
    breaks: usize,
    /// Whether weights are on another address, as large files are.
    redirect: bool,
    /// The commit reported for files.
    commit: Option<&'static str>,
    /// Every request line with its range.
    log: Vec<String>,
}

struct StandIn {
    address: String,
    behavior: Arc<Mutex<Behavior>>,
}

impl StandIn {
    fn new(files: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        let behavior = Arc::new(Mutex::new(Behavior {
            files: files.collect(),
            ..Behavior::default()
        }));
        let (shared, base) = (Arc::clone(&behavior), address.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that hangs up early is one of the cases.
                answer(stream.unwrap(), &base, &mut shared.lock().unwrap()).ok();
            }
        });
        Self { address, behavior }
    }

    fn set(&self, change: impl FnOnce(&mut Behavior)) {
        change(&mut self.behavior.lock().unwrap());
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.behavior.lock().unwrap().log)
    }
}

fn answer(mut stream: TcpStream, base: &str, behavior: &mut Behavior) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let path = request.split(' ').nth(1).unwrap_or("").to_owned();
    let range = headers.get("range").cloned();
    behavior
        .log
        .push(format!("{path} {}", range.as_deref().unwrap_or("-")));

    let wanted = behavior.token.map(|token| format!("Bearer {token}"));
    let refused = wanted.is_some() && headers.get("authorization") != wanted.as_ref();
    let status = behavior.status.or(refused.then_some(401));
    if let Some(status) = status {
        return respond(&mut stream, status, &[], "refused");
    }
    if let Some(revision) = path.strip_prefix("/api/models/org/tiny/revision/") {
        if !["main", "v1.0", COMMIT].contains(&revision) {
            return respond(&mut stream, 404, &[], "no such revision");
        }
        let names: Vec<_> = behavior.files.keys().collect();
        let siblings = names.iter().map(|n| format!(r#"{{"rfilename": "{n}"}}"#));
        let siblings = siblings.collect::<Vec<_>>().join(", ");
        let body = format!(r#"{{"sha": "{COMMIT}", "siblings": [{siblings}]}}"#);
        return respond(&mut stream, 200, &[], &body);
    }
    let resolve = format!("/org/tiny/resolve/{COMMIT}/");
    let (name, moved) = match (path.strip_prefix(&resolve), path.strip_prefix("/cdn/")) {
        (Some(name), _) => (name, false),
        (None, Some(name)) => (name, true),
        (None, None) => return respond(&mut stream, 404, &[], "no such page"),
    };
    let Some(content) = behavior.files.get(name).cloned() else {
        return respond(&mut stream, 404, &[], "no such file");
    };
    let commit = format!("X-Repo-Commit: {}", behavior.commit.unwrap_or(COMMIT));
    let etag = format!("etag-of-{}", name.replace('.', "-"));
    let weights = name.ends_with(".safetensors");
    if weights && behavior.redirect && !moved {
        let location = format!("Location: {base}/cdn/{name}");
        let etag = format!("X-Linked-Etag: \"{etag}\"");
        return respond(&mut stream, 302, &[location, etag, commit], "");
    }
    let headers = [format!("ETag: \"{etag}\""), commit];
    serve(
        &mut stream,
        range.as_deref(),
        &headers,
        &content,
        weights,
        behavior,
    )
}

/// Answers with the range of the content, or breaks off where it is told to.
fn serve(
    stream: &mut TcpStream,
    range: Option<&str>,
    headers: &[String],
    content: &str,
    weights: bool,
    behavior: &mut Behavior,
) -> std::io::Result<()> {
    let total = content.len();
    let (start, end) = range
        .and_then(|r| r.strip_prefix("bytes="))
        .and_then(|r| r.split_once('-'))
        .unwrap_or(("0", ""));
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(total, |last: usize| last + 1);
    if start >= total {
        return respond(stream, 416, &[], "");
    }
    let mut headers = headers.to_vec();
    headers.push(format!("Content-Range: bytes {start}-{}/{total}", end - 1));
    if weights && end - start > 10 && behavior.breaks > 0 {
        behavior.breaks -= 1;
        let length = end - start;
        let head = head(206, &headers, length);
        return write!(stream, "{head}{}", &content[start..start + 10]);
    }
    respond(stream, 206, &headers, &content[start..end])
}

fn head(status: u16, headers: &[String], length: usize) -> String {
    let headers: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
    format!(
        "HTTP/1.1 {status} Answer\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    )
}

fn respond(
    stream: &mut TcpStream,
    status: u16,
    headers: &[String],
    body: &str,
) -> std::io::Result<()> {
    write!(stream, "{}{body}", head(status, headers, body.len()))
}

/// An empty cache that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("windlass-hub-{name}-{}", std::process::id()));
        std::fs::remove_dir_all(&path).ok();
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn hub(server: &StandIn, cache: &Folder) -> Hub {
    Hub {
        cache: cache.0.clone(),
        endpoint: server.address.clone(),
        token: None,
        offline: false,
        retries: 0,
    }
}

fn quiet(hub: &Hub, model: &str) -> Result<PathBuf, HubError> {
    hub.resolve(model, &mut |_| {})
}

/// The failure of a model, its message without the changing address, and that it has a hint.
fn failure(hub: &Hub, model: &str) -> (HubError, String) {
    let error = quiet(hub, model).unwrap_err();
    assert!(error.hint().is_some(), "{error}");
    let message = error.to_string();
    let message = message.replace(&hub.endpoint, "HUB");
    let message = message.replace(&hub.cache.display().to_string(), "CACHE");
    (error, message)
}

fn contents(folder: &Path) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    let mut found: Vec<_> = entries
        .map(|e| {
            let name = e.file_name().into_string().unwrap();
            (name, std::fs::read_to_string(e.path()).unwrap())
        })
        .collect();
    found.sort();
    found
}

#[test]
fn a_model_is_fetched_once_into_the_standard_cache() {
    let server = StandIn::new(TINY);
    let cache = Folder::new("fetch");
    let hub = hub(&server, &cache);
    for (redirect, model, reference) in
        [(false, "org/tiny", "main"), (true, "org/tiny@v1.0", "v1.0")]
    {
        server.set(|b| b.redirect = redirect);
        let repo = cache.0.join("models--org--tiny");
        std::fs::remove_dir_all(&repo).ok();
        let mut events = Vec::new();
        let folder = hub
            .resolve(model, &mut |event| {
                events.push(match event {
                    Event::Received { file, done, total } => (file.to_owned(), done, total),
                    Event::Finished { file } => (file.to_owned(), 0, 0),
                    Event::Note(text) => (text, 0, 0),
                });
            })
            .unwrap();
        assert_eq!(folder, repo.join("snapshots").join(COMMIT));
        let named = std::fs::read_to_string(repo.join("refs").join(reference)).unwrap();
        assert_eq!(named, COMMIT);
        let mut wanted: Vec<_> = TINY
            .iter()
            .filter(|(name, _)| !["README.md", "pytorch_model.bin"].contains(name))
            .map(|(name, text)| (name.to_string(), text.to_string()))
            .collect();
        wanted.sort();
        assert_eq!(contents(&folder), wanted);
        let weights = ("model.safetensors".to_owned(), 42, 42);
        assert!(events.contains(&weights), "{events:?}");

        server.take_log();
        assert_eq!(quiet(&hub, model).unwrap(), folder);
        let log = server.take_log();
        assert_eq!(
            log,
            [format!("/api/models/org/tiny/revision/{reference} -")]
        );
        let offline = Hub {
            offline: true,
            ..hub.clone()
        };
        assert_eq!(quiet(&offline, model).unwrap(), folder);
        let by_commit = format!("org/tiny@{COMMIT}");
        assert_eq!(quiet(&offline, &by_commit).unwrap(), folder);
        assert_eq!(server.take_log(), [""; 0]);
    }
}

#[test]
fn shards_follow_the_index() {
    let server = StandIn::new(SHARDED);
    let cache = Folder::new("shards");
    let mut hub = hub(&server, &cache);
    let folder = quiet(&hub, "org/tiny").unwrap();
    assert_eq!(contents(&folder).len(), SHARDED.len());

    // An offline snapshot with a missing shard is no model.
    std::fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    hub.offline = true;
    let (_, message) = failure(&hub, "org/tiny");
    let expected = "org/tiny: offline (HF_HUB_OFFLINE), and CACHE lacks model-2.safetensors";
    assert_eq!(message, expected);
    hub.offline = false;
    // The blob is still there under its link: a dangling one is replaced.
    assert_eq!(quiet(&hub, "org/tiny").unwrap(), folder);

    for (index, reason) in [
        ("{}", "weight_map is missing"),
        (
            r#"{"weight_map": {"a": "../x"}}"#,
            "weight_map of a names \"../x\"",
        ),
        ("{", "EOF while parsing an object at line 1 column 1"),
    ] {
        let name = "model.safetensors.index.json";
        server.set(|b| {
            b.files
                .insert(name.to_owned(), index.to_owned())
                .map_or((), drop)
        });
        std::fs::remove_dir_all(cache.0.join("models--org--tiny")).unwrap();
        let (_, message) = failure(&hub, "org/tiny");
        assert!(message.ends_with(reason), "{message}");
    }
    server.set(|b| b.files.retain(|name, _| name == "config.json"));
    let (_, message) = failure(&hub, "org/tiny");
    assert!(
        message.contains("neither model.safetensors nor"),
        "{message}"
    );
}

#[test]
fn refusals_say_what_to_do() {
    let server = StandIn::new(TINY);
    let cache = Folder::new("refusals");
    let mut hub = hub(&server, &cache);
    for (model, expected) in [
        (
            "org/none",
            "org/none: model or revision not found on HUB, and there is no such local path",
        ),
        (
            "org/tiny@v9",
            "org/tiny@v9: model or revision not found on HUB, and there is no such local path",
        ),
        (
            "./missing/folder",
            "./missing/folder: no such file or folder, and not a hub id of the form org/name[@revision]",
        ),
        (
            "org/tiny@../../x",
            "org/tiny@../../x: no such file or folder, and not a hub id of the form org/name[@revision]",
        ),
    ] {
        assert_eq!(failure(&hub, model).1, expected);
    }
    server.set(|b| b.token = Some("secret"));
    let (error, message) = failure(&hub, "org/tiny");
    let expected = "org/tiny: HUB refuses access (HTTP 401): private, gated, or no such model";
    assert_eq!(message, expected);
    assert!(error.hint().unwrap().contains("HF_TOKEN"));
    hub.token = Some("wrong".to_owned());
    let (error, _) = failure(&hub, "org/tiny");
    assert!(error.hint().unwrap().contains("token that was sent"));
    assert!(!error.to_string().contains("wrong"));
    hub.token = Some("secret".to_owned());
    server.set(|b| b.commit = Some("another"));
    let (_, message) = failure(&hub, "org/tiny");
    assert!(message.contains("unexpected answer of HUB"), "{message}");
    server.set(|b| b.commit = None);
    assert!(quiet(&hub, "org/tiny").is_ok());
}

#[test]
fn a_broken_transfer_continues_where_it_stopped() {
    let server = StandIn::new(TINY);
    let cache = Folder::new("broken");
    let mut hub = hub(&server, &cache);
    server.set(|b| b.breaks = 1);
    let (error, message) = failure(&hub, "org/tiny");
    assert!(matches!(error, HubError::Transfer { .. }), "{error:?}");
    let expected = "org/tiny: fetching model.safetensors into CACHE failed: ";
    assert!(message.starts_with(expected), "{message}");
    let offline = Hub {
        offline: true,
        ..hub.clone()
    };
    assert!(matches!(
        quiet(&offline, "org/tiny"),
        Err(HubError::NotCached { .. })
    ));
    server.take_log();
    let folder = quiet(&hub, "org/tiny").unwrap();
    let weights = std::fs::read_to_string(folder.join("model.safetensors")).unwrap();
    assert_eq!(weights, TINY[5].1);
    let log = server.take_log();
    assert!(log.last().unwrap().ends_with("bytes=10-"), "{log:?}");

    // With retries one call is enough; an over-long part is started again.
    std::fs::remove_dir_all(cache.0.join("models--org--tiny")).unwrap();
    server.set(|b| b.breaks = 1);
    hub.retries = 1;
    quiet(&hub, "org/tiny").unwrap();
    let blobs = cache.0.join("models--org--tiny/blobs");
    std::fs::remove_file(blobs.join("etag-of-model-safetensors")).unwrap();
    let part = blobs.join("etag-of-model-safetensors.part");
    std::fs::write(&part, [0; 42]).unwrap();
    quiet(&hub, "org/tiny").unwrap();
    let weights = std::fs::read_to_string(folder.join("model.safetensors")).unwrap();
    assert_eq!(weights, TINY[5].1);
}

#[test]
fn without_the_hub_a_complete_cache_is_used_and_a_note_says_so() {
    let server = StandIn::new(TINY);
    let cache = Folder::new("unreachable");
    let hub = hub(&server, &cache);
    server.set(|b| b.status = Some(503));
    let (_, message) = failure(&hub, "org/tiny");
    assert!(
        message.starts_with("org/tiny: cannot reach HUB"),
        "{message}"
    );
    let offline = Hub {
        offline: true,
        ..hub.clone()
    };
    let (_, message) = failure(&offline, "org/tiny");
    let expected = "org/tiny: offline (HF_HUB_OFFLINE), and CACHE lacks the model";
    assert_eq!(message, expected);

    server.set(|b| b.status = None);
    let folder = quiet(&hub, "org/tiny").unwrap();
    server.set(|b| b.status = Some(503));
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    for endpoint in [server.address.clone(), nobody] {
        let hub = Hub {
            endpoint,
            ..hub.clone()
        };
        let mut notes = Vec::new();
        let found = hub.resolve("org/tiny", &mut |event| {
            if let Event::Note(text) = event {
                notes.push(text);
            }
        });
        assert_eq!(found.unwrap(), folder);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].starts_with("cannot reach http"), "{notes:?}");
    }
}

#[test]
fn local_paths_are_themselves() {
    let folder = Folder::new("local");
    let path = folder.0.to_str().unwrap();
    assert_eq!(windlass::hub::resolve(path).unwrap(), folder.0);
}

#[test]
fn the_environment_is_read_as_the_hub_documents_it() {
    let folder = Folder::new("environment");
    std::fs::write(folder.0.join("token"), " from-file\n").unwrap();
    let home = folder.0.to_str().unwrap();
    let read = |variables: &[(&str, &str)], home: Option<&str>| {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        let lookup = |name: &str| find(name).map(|(_, value)| value.to_string());
        Hub::from_lookup(lookup, home.map(PathBuf::from))
    };
    let plain = read(&[], Some("/home/me")).unwrap();
    assert_eq!(plain.cache, Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!(plain.endpoint, "https://huggingface.co");
    assert_eq!((plain.token, plain.offline), (None, false));
    let set = read(
        &[
            ("HF_HOME", home),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "yes"),
        ],
        None,
    )
    .unwrap();
    assert_eq!(set.cache, folder.0.join("hub"));
    assert_eq!(set.endpoint, "http://mirror");
    assert_eq!(
        (set.token.as_deref(), set.offline),
        (Some("from-file"), true)
    );
    let set = read(
        &[
            ("HF_HOME", home),
            ("HF_HUB_CACHE", "~/cache"),
            ("HF_TOKEN", "from-env"),
            ("HF_HUB_OFFLINE", "0"),
        ],
        Some("/home/me"),
    )
    .unwrap();
    assert_eq!(set.cache, Path::new("/home/me/cache"));
    assert_eq!(
        (set.token.as_deref(), set.offline),
        (Some("from-env"), false)
    );
    assert!(matches!(read(&[], None), Err(HubError::NoHome)));
}
