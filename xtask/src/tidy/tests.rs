//! Each law refuses the snippet that breaks it, and accepts the like that does not.

use serde_json::json;

use super::exceptions::Exceptions;
use super::laws::{Source, check_text};
use super::lexer::{functions, mask, test_items};
use super::{Violation, edges, files};

/// The violations of a file, as `line: message`.
fn refused(path: &str, text: &str) -> Vec<String> {
    let mut violations = check_text(path, text);
    violations.extend(Source::new(path, text).check(&mut Exceptions::default()));
    shown(violations)
}

fn shown(mut violations: Vec<Violation>) -> Vec<String> {
    violations.sort();
    let line = |v: &Violation| format!("{}: {}", v.line, v.message);
    violations.iter().map(line).collect()
}

#[test]
fn each_law_refuses_its_breach() {
    const TRAIN: &str = "crates/windlass-train/src/lib.rs";
    const INFER: &str = "crates/windlass-infer/src/x.rs";
    const MODEL: &str = "crates/windlass-model/src/x.rs";
    for (path, text, expected) in [
        (TRAIN, "\nunsafe fn f() {}\n", "2: `unsafe` outside"),
        (TRAIN, "fn f() { println!(\"a\") }", "1: `println!`: only"),
        (TRAIN, "fn f() { eprint!(\"a\") }", "1: `eprint!`: only"),
        (TRAIN, "use std::io::stdout;", "1: `stdout`: only"),
        (
            TRAIN,
            "fn f() { std::env::var(\"A\"); }",
            "1: `env::`: only",
        ),
        (
            "crates/windlass-kernels/src/dispatch.rs",
            "fn f() { std::env::var(\"OTHER\"); }",
            "1: `env::`: only",
        ),
        (INFER, "use std::time::Duration;", "1: `std::time`: time"),
        (INFER, "fn f() { Instant::now(); }", "1: `Instant`: time"),
        (INFER, "fn f() { thread_rng(); }", "1: `thread_rng`: time"),
        (
            TRAIN,
            "#[test]\n#[ignore = \"slow\"]\nfn f() {}",
            "2: an ignored test",
        ),
        (
            TRAIN,
            "/// ```ignore\n/// ```\nfn f() {}",
            "1: an ignored example",
        ),
        (TRAIN, "fn f() { todo!() }", "1: `todo!`: nothing"),
        (TRAIN, "fn f() { unimplemented!() }", "1: `unimplemented!`"),
        (TRAIN, "fn f() { dbg!(1); }", "1: `dbg!` is"),
        (TRAIN, "// TODO later\n", "1: TODO: finish"),
        ("README.md", "a\nFIXME: b\n", "2: FIXME: finish"),
        (TRAIN, "const A: &str = \"/work/x\";", "1: `/work/` is"),
        ("a.py", "open('/root/x')", "1: `/root/` is"),
        (TRAIN, "mod utils;", "1: `utils` says nothing"),
        ("crates/windlass-train/src/types.rs", "", "0: `types` says"),
        (
            "crates/windlass-common/src/lib.rs",
            "",
            "0: `windlass-common`",
        ),
        (MODEL, "pub struct QuantizedLlama;", "1: a quantized twin"),
        (
            "crates/windlass-model/src/quantized_llama.rs",
            "",
            "0: a quantized",
        ),
        (
            TRAIN,
            "#[allow(dead_code)]\nfn f() {}",
            "1: `#[allow(..)]` without",
        ),
        (
            TRAIN,
            "#![expect(dead_code)]\n",
            "1: `#![expect(..)]` without",
        ),
    ] {
        let found = refused(path, text);
        let one = matches!(&found[..], [only] if only.starts_with(expected));
        assert!(one, "{path}: {text:?}: {expected}: {found:?}");
    }
}

#[test]
fn the_like_that_breaks_no_law_is_accepted() {
    const TRAIN: &str = "crates/windlass-train/src/lib.rs";
    for (path, text) in [
        ("crates/windlass-kernels/src/x.rs", "unsafe fn f() {}"),
        ("crates/windlass-store/src/mmap.rs", "unsafe fn f() {}"),
        ("crates/windlass-store/src/swap/ring.rs", "unsafe fn f() {}"),
        (
            TRAIN,
            "// unsafe println! Instant\nfn f() -> &'static str { \"unsafe println!()\" }",
        ),
        (TRAIN, "fn unsafe_name() { my_println!(); }"),
        (
            TRAIN,
            "#[cfg(test)]\nmod tests {\n    fn f() { println!(\"skipped\"); std::env::var(\"A\"); }\n}",
        ),
        (
            "crates/windlass-train/tests/a.rs",
            "fn f() { println!(\"a\"); }",
        ),
        (
            "crates/windlass/src/main.rs",
            "fn main() { println!(\"{:?}\", std::env::args()); }",
        ),
        (
            "crates/windlass-kernels/src/dispatch.rs",
            "fn f() { std::env::var(\"WINDLASS_KERNELS\"); }",
        ),
        (TRAIN, "use std::time::Instant;"),
        (
            TRAIN,
            "#[expect(dead_code, reason = \"shown in an example\")]\nfn f() {}",
        ),
        (TRAIN, "const VERSION: &str = env!(\"CARGO_PKG_VERSION\");"),
        (TRAIN, "// A MASTODON and a TODOLIST\n"),
    ] {
        assert_eq!(refused(path, text), [""; 0], "{path}: {text}");
    }
}

#[test]
fn sizes_have_limits_and_listed_exceptions() {
    const PATH: &str = "crates/windlass-train/src/x.rs";
    let function = |lines: usize| format!("fn long() {{\n{}}}\n", "    f();\n".repeat(lines - 2));
    let file = |lines: usize| "const A: u8 = 1;\n".repeat(lines);
    let test = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", function(400));
    assert_eq!(refused(PATH, &function(70)), [""; 0]);
    assert_eq!(
        refused(PATH, &function(71)),
        ["1: function long: 71 lines, of 70"]
    );
    assert_eq!(refused(PATH, &(file(500) + &test)), [""; 0]);
    let long = file(501) + &function(71) + &test;
    let expected = [
        "0: 572 lines without tests, of 500",
        "502: function long: 71 lines, of 70",
    ];
    assert_eq!(refused(PATH, &long), expected);
    assert_eq!(refused("crates/windlass/tests/x.rs", &long), [""; 0]);

    let list = format!(
        "# comment\n\n{PATH} one big table of cases\n{PATH}:long one block of assembly\nold.rs:gone was long once\n"
    );
    let mut exceptions = Exceptions::parse(&list).unwrap();
    let violations = Source::new(PATH, &long).check(&mut exceptions);
    assert_eq!(shown(violations), [""; 0]);
    let unused = shown(exceptions.unused().collect());
    assert_eq!(
        unused,
        ["5: old.rs:gone needs no exception any more: remove it"]
    );
    assert!(Exceptions::parse("a.rs\n").is_err());
    assert!(Exceptions::parse("a.rs one good reason\na.rs one good reason\n").is_err());
}

#[test]
fn edges_follow_the_table() {
    let package = |name: &str, dependencies: &[(&str, Option<&str>)]| {
        let dependencies: Vec<_> = dependencies
            .iter()
            .map(|(name, kind)| json!({"name": name, "kind": kind}))
            .collect();
        json!({"name": name, "dependencies": dependencies})
    };
    let check = |packages: Vec<serde_json::Value>| {
        let found = edges::check(&json!({"packages": packages})).unwrap();
        let line = |v: Violation| format!("{} {}", v.path, v.message);
        found.into_iter().map(line).collect::<Vec<_>>()
    };
    let store = || package("windlass-store", &[("serde", None)]);
    let train = || package("windlass-train", &[("windlass-store", None)]);
    for (bad, expected) in [
        (
            package("windlass-model", &[("windlass-store", None)]),
            "windlass-model may not depend on windlass-store",
        ),
        (
            package("windlass-infer", &[("windlass-train", None)]),
            "windlass-infer may not depend on windlass-train",
        ),
        (
            package("windlass-kernels", &[("windlass-store", Some("build"))]),
            "windlass-kernels may not depend on windlass-store",
        ),
        (
            package("windlass-infer", &[("tokio", None)]),
            "windlass-infer may not depend on tokio, a crate kept to others",
        ),
        (
            package("windlass-model", &[("rand", Some("dev"))]),
            "windlass-model may not depend on rand, a crate kept to others",
        ),
        (
            package("windlass-magic", &[]),
            "windlass-magic unknown crate: give it a row in xtask/src/tidy/edges.rs",
        ),
    ] {
        assert_eq!(check(vec![store(), train(), bad]), [expected]);
    }
    let good = package(
        "windlass-model",
        &[("windlass-store", Some("dev")), ("half", None)],
    );
    let all = package("windlass", &[("windlass-train", None), ("clap", None)]);
    assert_eq!(check(vec![store(), train(), good, all]), [""; 0]);
}

#[test]
fn manifests_and_documents_say_what_they_must() {
    let good = "[package]\nname = \"a\"\n[lints]\nworkspace = true\n";
    assert_eq!(shown(files::check_manifest("m", "a", good)), [""; 0]);
    let found = shown(files::check_manifest("m", "b", "[package]\nname = \"a\"\n"));
    let expected = [
        "0: lacks `[lints]` `workspace = true`",
        "0: the package is not named as its folder",
    ];
    assert_eq!(found, expected);
    let lints = "missing_docs = \"warn\"\nunsafe_op_in_unsafe_fn = \"deny\"\n";
    assert_eq!(shown(files::check_root(lints, "target/\n")), [""; 0]);
    assert_eq!(files::check_root("", "Cargo.lock\n").len(), 3);
    let mentions = |text| shown(files::check_mentions("README.md", text, &["one", "two"]));
    assert_eq!(mentions("one and two"), [""; 0]);
    assert_eq!(mentions("one"), ["0: does not mention `two`"]);
    assert_eq!(mentions(""), ["0: missing"]);
}

#[test]
fn masking_keeps_code_and_blanks_the_rest() {
    for (source, expected) in [
        ("a // b\nc", "a     \nc"),
        ("a /* b /* c */ d */ e", "a                   e"),
        (r#"f("a\"b", 'c')"#, "f(      ,    )"),
        (
            "f('\\'', '\"', b'x', '\\u{1F600}')",
            "f(    ,    , b   ,            )",
        ),
        (
            "fn f<'a>(x: &'a str) { 'l: loop {} }",
            "fn f<'a>(x: &'a str) { 'l: loop {} }",
        ),
        ("r#\"a \" b\"# c r\"d\" r#type", "           c      r#type"),
        ("br##\"a\"# b\"## c", "b            c"),
        ("é 'é' \"é\"", "é           "),
        ("let bar = \"}\";", "let bar =    ;"),
    ] {
        let got = mask(source);
        assert_eq!(got.len(), source.len(), "{source}");
        let got: Vec<&str> = got.split(' ').filter(|part| !part.is_empty()).collect();
        let expected: Vec<&str> = expected
            .split(' ')
            .filter(|part| !part.is_empty())
            .collect();
        assert_eq!(got, expected, "{source}");
    }
}

#[test]
fn functions_and_tests_are_found_whole() {
    let source = "trait T { fn declared(&self) -> [u8; 3]; }\n\
        type F = fn(u8) -> u8;\n\
        fn generic<const N: usize>(x: [u8; { N }]) -> [u8; N] where [u8; N]: Sized { x }\n\
        macro_rules! m { ($name:ident) => { fn $name() { if a { } } } }\n\
        fn outer() { fn inner() { '}'; } let s = \"}\"; }\n\
        #[cfg(test)]\n#[expect(x, reason = \"[;\")]\nmod tests { fn t() {} }\n\
        fn after() {}\n";
    let code = mask(source);
    let found = functions(&code);
    let names: Vec<&str> = found.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["generic", "$name", "outer", "inner", "t", "after"]);
    assert!(source[found[2].range.clone()].ends_with("let s = \"}\"; }"));
    let tests = test_items(&code);
    assert_eq!(tests.len(), 1);
    assert!(source[tests[0].clone()].ends_with("mod tests { fn t() {} }"));
}
