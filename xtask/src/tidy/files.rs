//! What the files beside the sources must say.

use std::path::Path;

use super::Violation;

/// Checks manifests, lock file and documents.
pub fn check(root: &Path) -> anyhow::Result<Vec<Violation>> {
    let mut violations = Vec::new();
    let mut crates = Vec::new();
    for entry in root.join("crates").read_dir()? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let path = format!("crates/{name}/Cargo.toml");
        let manifest = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
        violations.extend(check_manifest(&path, &name, &manifest));
        crates.push(name);
    }
    crates.sort();
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap_or_default();
    violations.extend(check_root(&read("Cargo.toml"), &read(".gitignore")));
    if !root.join("Cargo.lock").exists() {
        violations.push(Violation::new("Cargo.lock", 0, "missing"));
    }
    let crates: Vec<&str> = crates.iter().map(String::as_str).collect();
    let commands = ["cargo run --release -- quickstart", "cargo xtask ci"];
    violations.extend(check_mentions("README.md", &read("README.md"), &commands));
    violations.extend(check_mentions(
        "ARCHITECTURE.md",
        &read("ARCHITECTURE.md"),
        &crates,
    ));
    violations.extend(check_mentions(
        "CHANGELOG.md",
        &read("CHANGELOG.md"),
        &["## "],
    ));
    Ok(violations)
}

/// A crate's folder is its name, and it asks for the lints of the workspace.
pub fn check_manifest(path: &str, folder: &str, manifest: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    if !manifest.contains(&format!("name = \"{folder}\"\n")) {
        violations.push(Violation::new(
            path,
            0,
            "the package is not named as its folder",
        ));
    }
    if !manifest.contains("[lints]\nworkspace = true\n") {
        violations.push(Violation::new(
            path,
            0,
            "lacks `[lints]` `workspace = true`",
        ));
    }
    violations
}

/// The workspace asks for documentation everywhere and keeps its lock file.
pub fn check_root(manifest: &str, ignored: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    for lint in ["missing_docs", "unsafe_op_in_unsafe_fn"] {
        if !manifest.contains(&format!("{lint} = \"")) {
            let message = format!("the workspace lints lack {lint}");
            violations.push(Violation::new("Cargo.toml", 0, message));
        }
    }
    if ignored.lines().any(|line| line.contains("Cargo.lock")) {
        let message = "Cargo.lock is ignored; it belongs to the repository";
        violations.push(Violation::new(".gitignore", 0, message));
    }
    violations
}

/// A document exists and names what it must.
pub fn check_mentions(path: &str, text: &str, wanted: &[&str]) -> Vec<Violation> {
    if text.is_empty() {
        return vec![Violation::new(path, 0, "missing")];
    }
    let absent = wanted.iter().filter(|phrase| !text.contains(**phrase));
    absent
        .map(|phrase| Violation::new(path, 0, format!("does not mention `{}`", phrase.trim())))
        .collect()
}
