//! From files to batches: formats, errors, the token file, splits, order and resuming.

use std::fs;
use std::path::{Path, PathBuf};
use std::slice::from_ref;
use std::sync::Arc;

use windlass_model::Tokenizer;
use windlass_train::Error;
use windlass_train::data::{
    Batch, Corpus, Evaluation, Packing, ReadOptions, Sampler, Split, TokenFile, TokenizeOptions,
    View, tokenize,
};

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("windlass-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn options(field: &str, separator: Option<&str>) -> ReadOptions {
    ReadOptions {
        field: field.into(),
        separator: separator.map(Into::into),
    }
}

/// Documents put together from their pieces.
fn documents(path: &Path, options: ReadOptions, size: Option<usize>) -> Result<Vec<String>, Error> {
    let corpus = Corpus::open(&[path.to_owned()], options)?;
    let (mut documents, mut current) = (Vec::new(), String::new());
    let mut pieces = corpus.pieces(size);
    for piece in &mut pieces {
        let piece = piece?;
        assert_eq!(piece.first, current.is_empty());
        current += &piece.text;
        if piece.last {
            documents.push(std::mem::take(&mut current));
        }
    }
    assert_eq!(pieces.bytes_read(), corpus.bytes());
    Ok(documents)
}

/// A Parquet file with the columns `id` and `story`, in groups of two rows.
fn parquet(path: &Path, stories: &[Option<&str>]) {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    let schema = "message table { required int32 id; optional byte_array story (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    for rows in stories.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i32> = (0..rows.len() as i32).collect();
        let numbers = column.typed::<Int32Type>();
        numbers.write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = rows.iter().flatten().map(|&text| text.into()).collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let texts = column.typed::<ByteArrayType>();
        texts.write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn documents_come_from_every_format_in_order() {
    let folder = Folder::new("formats");
    let mixed = "\u{feff}first\n\nline\n<|end|>\nsecond\n<|end|>\n<|end|>\r\n third é\n";
    folder.file("data/b.txt", mixed);
    let lines = "{\"text\": \"one\", \"n\": 1}\n\n{\"text\": null}\n  \"two\"";
    folder.file("data/a.jsonl", lines);
    let array = " [ {\"n\": [1], \"text\": \"x\\ny\"} , \"plain\",\n{\"text\":\" \"}]\n";
    folder.file("data/c/deep.json", array);
    folder.file("data/c/empty.json", "[]");
    folder.file("data/.hidden/no.txt", "hidden");
    folder.file("data/notes.md", "not data");
    let separated = options("text", Some("<|end|>"));
    let all = documents(&folder.0.join("data"), separated.clone(), None).unwrap();
    let expected = [
        "one",
        "two",
        "first\n\nline",
        "second",
        " third é",
        "x\ny",
        "plain",
    ];
    assert_eq!(all, expected);
    let table = folder.0.join("d.parquet");
    parquet(&table, &[Some("α"), Some("β"), None, Some("γ"), Some("δ")]);
    let stories = documents(&table, options("story", None), None).unwrap();
    assert_eq!(stories, ["α", "β", "γ", "δ"]);

    // Pieces put together are the whole, wherever blocks, characters and separators are cut.
    let words: String = (0..120_000)
        .map(|i| format!("wörd{} 🙂\n", i % 977))
        .collect();
    let unbroken = "無".repeat(200_000);
    let text = format!("{words}<|end|>\n{unbroken}<|end|>{words}");
    let long = folder.file("long.txt", &text);
    let json = serde_json::json!([words, unbroken, words]).to_string();
    let json = folder.file("long.json", json);
    for size in [None, Some(1), Some(5_000), Some(64 * 1024)] {
        let split = documents(&long, separated.clone(), size).unwrap();
        assert!(
            split == [words.trim_end(), &unbroken, words.trim_end()],
            "{size:?}"
        );
        let whole = documents(&long, options("text", None), size).unwrap();
        assert!(whole == [text.as_str()], "{size:?}");
        let array = documents(&json, options("text", None), size).unwrap();
        assert!(array == [words.as_str(), &unbroken, &words], "{size:?}");
    }
}

#[test]
fn bad_input_is_named_with_its_place() {
    let folder = Folder::new("bad-input");
    let table = folder.0.join("t.parquet");
    parquet(&table, &[Some("α")]);
    let latin = [&[b'a'; 300_000][..], b"\xe9 "].concat();
    let lines = "{\"text\": \"a\"}\n{\"body\": \"b\", \"title\": \"c\"}\n";
    fs::create_dir(folder.0.join("bare")).unwrap();
    let file = |name: &str, content: &[u8]| folder.file(name, content);
    for (path, field, message, hint) in [
        (
            file("1.jsonl", lines.as_bytes()),
            "text",
            ["1.jsonl, line 2", "`text`"],
            "body, title",
        ),
        (
            file("2.jsonl", b"{\"text\": 3}"),
            "text",
            ["2.jsonl, line 1", "a number"],
            "--field",
        ),
        (
            file("3.jsonl", b"\"a\"\n{\"te"),
            "text",
            ["3.jsonl, line 2", "not JSON"],
            "",
        ),
        (
            file("4.json", b"[\"a\", [1]]"),
            "text",
            ["4.json, row 2", "an array"],
            ".jsonl",
        ),
        (
            file("5.json", b"{\"text\": \"a\"}"),
            "text",
            ["5.json", "not a JSON array"],
            ".jsonl",
        ),
        (
            file("6.json", b"[\"a\", \"b\""),
            "text",
            ["row 2", "not closed"],
            "",
        ),
        (
            file("7.json", b"[\"a\" \"b\"]"),
            "text",
            ["row 1", "comma"],
            "",
        ),
        (table.clone(), "text", ["t.parquet", "`text`"], "id, story"),
        (table, "id", ["row 1", "`id` is 0"], "--field"),
        (
            file("8.parquet", b"PAR1"),
            "text",
            ["8.parquet", "not a Parquet file"],
            "",
        ),
        (
            file("9.txt", &latin),
            "text",
            ["9.txt", "offset 300000"],
            "iconv",
        ),
        (
            file("10.txt", b"a\xc3"),
            "text",
            ["10.txt", "offset 1"],
            "iconv",
        ),
        (
            file("11.txt", b" \n"),
            "text",
            ["empty", "11.txt"],
            "give files",
        ),
        (
            file("12.csv", b"a,b"),
            "text",
            ["12.csv", "not a data file"],
            ".parquet",
        ),
        (folder.0.join("none.txt"), "text", ["open", "none.txt"], ""),
        (folder.0.join("bare"), "text", ["empty", "bare"], "folder"),
    ] {
        let error = documents(&path, options(field, None), None).unwrap_err();
        let text = error.to_string();
        assert!(message.iter().all(|part| text.contains(part)), "{text}");
        let advice = error.hint().unwrap_or_default();
        assert!(advice.contains(hint), "{text}: {advice}");
    }
}

fn tokenize_options(threads: usize, bos: bool, folder: PathBuf) -> TokenizeOptions {
    TokenizeOptions {
        threads,
        bos,
        folder,
    }
}

#[test]
fn token_files_hold_the_documents_and_are_reused() {
    let folder = Folder::new("tokens");
    let words: String = (0..15_000)
        .map(|i| format!("word{} and more.\n", i % 977))
        .collect();
    let stories: Vec<String> = (0..1_000)
        .map(|i| format!("Story {i}: {}", &words[i..i + 200]))
        .collect();
    folder.file("in/1.json", serde_json::to_string(&stories).unwrap());
    folder.file("in/2.txt", &words);
    let open = || Corpus::open(&[folder.0.join("in")], ReadOptions::default()).unwrap();
    let corpus = open();
    let small = Tokenizer::train(stories.iter(), 400, "<|end|>").unwrap();
    let other = Tokenizer::train(stories.iter(), 400, "<|stop|>").unwrap();
    let mut contents = Vec::new();
    for (threads, bos) in [(1, false), (3, false), (2, true)] {
        let options = tokenize_options(threads, bos, folder.0.join(format!("out{threads}")));
        let mut last = None;
        let mut note = |progress| last = Some(progress);
        let made = tokenize(&corpus, &small, &options, &mut note).unwrap();
        let progress = last.unwrap();
        assert!(!made.reused);
        assert_eq!(
            (progress.bytes, progress.tokens),
            (corpus.bytes(), made.file.tokens())
        );
        contents.push(fs::read(made.file.path()).unwrap());

        let description = made.file.description();
        assert_eq!((description.documents, description.skipped), (1_001, 0));
        let mut expected: Vec<u32> = Vec::new();
        for (number, text) in stories.iter().chain([&words]).enumerate() {
            assert_eq!(made.file.offsets()[number], expected.len() as u64);
            expected.extend(bos.then_some(0));
            expected.extend(small.encode(text, false).unwrap());
            expected.push(0);
        }
        let mut ids = Vec::new();
        made.file.read(0..made.file.tokens(), &mut ids);
        assert!(ids == expected, "the ids differ");

        let mut idle = |_| panic!("nothing is to be done");
        assert!(
            tokenize(&corpus, &small, &options, &mut idle)
                .unwrap()
                .reused
        );
        folder.file("in/2.txt", format!("{words}!"));
        assert!(
            !tokenize(&open(), &small, &options, &mut |_| ())
                .unwrap()
                .reused
        );
        folder.file("in/2.txt", &words);
        assert!(
            !tokenize(&corpus, &other, &options, &mut |_| ())
                .unwrap()
                .reused
        );

        let whole = fs::read(made.file.path()).unwrap();
        let longer = [&whole[..8], &whole[..]].concat();
        for damaged in [&whole[..whole.len() - 1], &whole[8..], &whole[..4], &longer] {
            fs::write(made.file.path(), damaged).unwrap();
            let error = tokenize(&corpus, &small, &options, &mut |_| ()).unwrap_err();
            assert!(matches!(error, Error::TokenFile { .. }), "{error}");
            assert!(error.hint().unwrap().contains("delete"));
        }
    }
    assert!(
        contents[0] == contents[1],
        "the number of threads changed the file"
    );

    // An error of a reader thread arrives, and nothing is left behind.
    let path = folder.file("bad.jsonl", "\"a\"\n{}\n".repeat(100_000));
    let corpus = Corpus::open(from_ref(&path), ReadOptions::default()).unwrap();
    let options = tokenize_options(2, false, folder.0.join("bad"));
    let error = tokenize(&corpus, &small, &options, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
    assert_eq!(fs::read_dir(&options.folder).unwrap().count(), 0);
}

/// A corpus of `n` small documents, tokenized by bytes; 0 ends a document.
fn token_file(folder: &Folder, n: usize) -> Arc<TokenFile> {
    let lines: String = (0..n)
        .map(|i| format!("\"{}\"\n", "ab".repeat(1 + i * 7 % 11)))
        .collect();
    let path = folder.file("docs.jsonl", lines);
    let corpus = Corpus::open(&[path], ReadOptions::default()).unwrap();
    let tokenizer = Tokenizer::train(["a"].iter(), 257, "<|end|>").unwrap();
    let options = tokenize_options(2, false, folder.0.join("tokens"));
    let made = tokenize(&corpus, &tokenizer, &options, &mut |_| ()).unwrap();
    Arc::new(made.file)
}

fn tokens_of(view: &View) -> (Vec<u32>, Vec<usize>) {
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    view.read(0..view.tokens(), &mut ids, &mut starts);
    (ids, starts)
}

#[test]
fn splits_part_documents_or_the_tail() {
    let folder = Folder::new("split");
    let file = token_file(&folder, 200);
    let split = Split::new(&file, 0.1, 5).unwrap();
    let held_out = split.held_out.as_ref().unwrap();
    assert_eq!(split.train.tokens() + held_out.tokens(), file.tokens());
    let (ids, starts) = tokens_of(held_out);
    assert_eq!((starts.len(), starts[0]), (20, 0));
    let ends = (1..=ids.len()).filter(|&end| ids[end - 1] == 0);
    assert!(ends.take(19).eq(starts[1..].iter().copied()));
    assert_eq!(tokens_of(&split.train).1.len(), 180);
    let again = Split::new(&file, 0.1, 5).unwrap().held_out.unwrap();
    assert_eq!(tokens_of(&again), tokens_of(held_out));
    let other = Split::new(&file, 0.1, 6).unwrap().held_out.unwrap();
    assert_ne!(tokens_of(&other), tokens_of(held_out));

    // Any part of the stream reads the same as from the whole.
    let (ids, starts) = tokens_of(&split.train);
    for from in (0..ids.len() - 40).step_by(13) {
        let (mut part, mut begins) = (Vec::new(), Vec::new());
        let range = from as u64..from as u64 + 40;
        split.train.read(range, &mut part, &mut begins);
        assert_eq!(part, ids[from..from + 40]);
        let inside = starts
            .iter()
            .filter(|&&start| (from..from + 40).contains(&start));
        assert!(inside.map(|start| start - from).eq(begins));
    }

    let tail = Split::new(&file, 0.001, 5).unwrap().held_out.unwrap();
    assert_eq!(tail.tokens(), (file.tokens() as f64 * 0.001).round() as u64);
    assert!(Split::new(&file, 0.0, 5).unwrap().held_out.is_none());
    assert!(Split::new(&file, 1.0, 5).is_err());
}

/// Checks that a batch is consistent in itself.
fn check_batch(batch: &Batch, packing: Packing, seq_len: usize) {
    let total = batch.ids.len();
    assert_eq!((batch.targets.len(), batch.positions.len()), (total, total));
    assert_eq!(batch.segments.iter().sum::<usize>(), total);
    let mut at = 0;
    for &segment in &batch.segments {
        let positions: Vec<u32> = (0..segment as u32).collect();
        assert_eq!(batch.positions[at..at + segment], positions);
        at += segment;
        let inner = &batch.ids[at - segment..at - 1];
        assert!(packing == Packing::Stream || inner.iter().all(|&id| id != 0));
    }
    for i in 0..total {
        let inside = i + 1 < total && (i + 1) % seq_len != 0;
        match (packing, batch.ids[i], batch.targets[i]) {
            (Packing::Documents, 0, target) => assert_eq!(target, -100),
            (_, _, target) if inside => assert_eq!(target, i64::from(batch.ids[i + 1])),
            (_, _, target) => assert!(target >= 0),
        }
    }
}

fn check_sampler(view: &View, packing: Packing, seq_len: usize) {
    let new = || Sampler::new(view.clone(), seq_len, packing, 9).unwrap();
    let mut sampler = new();
    let n = sampler.sequences() as usize;
    assert_eq!(n as u64, (view.tokens() - 1) / seq_len as u64);
    let (all, starts) = tokens_of(view);
    let mut order: Vec<u32> = Vec::new();
    for _ in 0..2 {
        let mut batches: Vec<Batch> = (0..n).map(|_| sampler.next_batch(1)).collect();
        for batch in &batches {
            check_batch(batch, packing, seq_len);
            order.extend_from_slice(&batch.ids);
        }
        let mut expected: Vec<&[u32]> = all[..n * seq_len].chunks(seq_len).collect();
        expected.sort_unstable();
        batches.sort_unstable_by(|a, b| a.ids.cmp(&b.ids));
        assert!(
            batches
                .iter()
                .map(|batch| batch.ids.as_slice())
                .eq(expected)
        );
    }
    let (first, second) = order.split_at(n * seq_len);
    assert!(n < 20 || first != second, "epochs have the same order");

    // However the sequences are divided into batches and among ranks, their order is the same.
    assert!(new().next_batch(2 * n).ids == order);
    let mut ranks = [new().shard(0, 2), new().shard(1, 2)];
    let steps = (0..n / 2).flat_map(|_| ranks.each_mut().map(|rank| rank.next_batch(2).ids));
    let shared = steps.collect::<Vec<_>>().concat();
    assert!(shared == order[..shared.len()]);

    let mut resumed = new();
    sampler.next_batch(n / 2 + 1);
    let saved = serde_json::to_string(&sampler.state()).unwrap();
    resumed
        .resume(&serde_json::from_str(&saved).unwrap())
        .unwrap();
    for _ in 0..n {
        assert_eq!(resumed.next_batch(3), sampler.next_batch(3));
    }
    assert_eq!(resumed.state(), sampler.state());
    let mut other = Sampler::new(view.clone(), seq_len, packing, 10).unwrap();
    let refused = other.resume(&sampler.state());
    assert!(matches!(refused, Err(Error::Changed { .. })));

    let pass = Evaluation::new(view.clone(), seq_len, packing, 4).unwrap();
    assert_eq!(pass.sequences() as usize, (all.len() - 1).div_ceil(seq_len));
    let (mut ids, mut scored) = (Vec::new(), 0);
    for batch in pass {
        check_batch(&batch, packing, seq_len);
        ids.extend_from_slice(&batch.ids);
        scored += batch.scored();
    }
    assert!(ids == all[..all.len() - 1]);
    let unscored = match packing {
        Packing::Documents => starts.len() - 1,
        Packing::Stream => 0,
    };
    assert_eq!(scored, ids.len() - unscored);
}

#[test]
fn every_sequence_comes_once_an_epoch_and_resuming_changes_nothing() {
    let folder = Folder::new("sampler");
    let file = token_file(&folder, 300);
    let view = View::whole(file.clone());
    check_sampler(&view, Packing::Documents, 16);
    check_sampler(&view, Packing::Documents, 1);
    check_sampler(&view, Packing::Stream, 16);
    check_sampler(&view, Packing::Stream, 1000);
    check_sampler(
        &Split::new(&file, 0.2, 1).unwrap().train,
        Packing::Documents,
        7,
    );

    let long = file.tokens() as usize;
    let error = Sampler::new(view.clone(), long, Packing::Stream, 1).unwrap_err();
    assert!(error.to_string().contains("training") && error.hint().is_some());
    assert!(Sampler::new(view, 0, Packing::Stream, 1).is_err());
}
