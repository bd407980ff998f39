//! The server and the clients that people have: they run against the model of the quickstart.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Outcome, cargo, command, debian, quickstart_folder, status, with_python};

/// What asks the server.
const PACKAGES: [&str; 6] = [
    "anthropic",
    "openai",
    "playwright",
    "prometheus-client",
    "pydantic",
    "schemathesis",
];

/// What scores models through the server. It needs no torch for that.
const HARNESS_PACKAGES: [&str; 2] = ["lm-eval[api]", "transformers"];

/// The browser that uses the chat page, where it is installed.
const BROWSER: &str = "/usr/bin/chromium";

/// What Node's client runs in.
const NODE: [(&str, &[&str]); 2] = [("node", &["nodejs"]), ("npm", &["npm"])];

/// Builds the server, and lets all clients ask it.
pub fn run(root: &Path) -> anyhow::Result<Outcome> {
    let model = quickstart_folder(root).join("quickstart/model");
    if !model.join("config.json").is_file() {
        let reason = "the step quickstart leaves the model that is served";
        return Ok(Outcome::Failed(reason.to_owned()));
    }
    let build = ["build", "--release", "--package", "windlass"];
    if let Outcome::Failed(detail) = cargo(root, &build)? {
        return Ok(Outcome::Failed(format!("the build: {detail}")));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| root.join("target"), PathBuf::from);
    let windlass = target.join("release/windlass");
    let mut left_out = Vec::new();
    let asked = with_python(root, "clients", &PACKAGES, |interpreter| {
        let script = |name: &str| {
            let mut script = Command::new(interpreter);
            script.arg(root.join("tests/clients").join(name));
            script.arg(&windlass).arg(&model);
            script
        };
        for name in ["clients.py", "adapters.py", "operations.py", "fuzz.py"] {
            if let Outcome::Failed(detail) = status(&mut script(name))? {
                return Ok(Outcome::Failed(format!("{name}: {detail}")));
            }
        }
        match node(root)? {
            Ok(folder) => {
                if let Outcome::Failed(detail) = status(script("node.py").arg(folder))? {
                    return Ok(Outcome::Failed(format!("node.py: {detail}")));
                }
            }
            Err(reason) => left_out.push(reason),
        }
        if !Path::new(BROWSER).exists() {
            left_out.push(format!("the page was not used: no {BROWSER}"));
            return Ok(Outcome::Passed(String::new()));
        }
        status(script("page.py").arg(root.join("target/ci-page")))
    })?;
    if !matches!(asked, Outcome::Passed(_)) {
        return Ok(asked);
    }
    let scored = with_python(root, "harness", &HARNESS_PACKAGES, |interpreter| {
        let mut script = Command::new(interpreter);
        script.arg(root.join("tests/clients/harness.py"));
        status(script.arg(&windlass).arg(&model))
    })?;
    match scored {
        Outcome::Failed(detail) => return Ok(Outcome::Failed(format!("harness.py: {detail}"))),
        Outcome::Skipped(reason) => left_out.push(format!("lm-eval was not run: {reason}")),
        Outcome::Passed(_) => {}
    }
    Ok(Outcome::Passed(left_out.join("; ")))
}

/// A folder with the openai client for Node, or why there is none.
fn node(root: &Path) -> anyhow::Result<Result<PathBuf, String>> {
    let missing = debian::install(&NODE, &["--no-install-recommends"]);
    if !missing.is_empty() {
        let missing = missing.join(" and ");
        return Ok(Err(format!("Node's client was not run: no {missing}")));
    }
    let folder = root.join("target/node");
    std::fs::create_dir_all(&folder)?;
    let install = ["install", "--no-audit", "--no-fund", "--silent", "openai"];
    // Without a manifest here it would install into a folder further up that has one.
    std::fs::write(folder.join("package.json"), "{}")?;
    Ok(match status(&mut command(&folder, "npm", &install))? {
        Outcome::Failed(_) => {
            Err("Node's client was not run: npm cannot install openai".to_owned())
        }
        _ => Ok(folder),
    })
}
