//! What is typed into a conversation: messages of one or several lines, and commands.

use std::io::{self, BufRead};
use std::path::PathBuf;

/// What /help shows.
pub const HELP: &str = "\
/reset          begin anew; the system message stays
/system TEXT    tell the model TEXT before the conversation; without TEXT, nothing
/save FILE      write the conversation as JSON
/load FILE      go on with a conversation that was saved
/adapter NAME   answer with one adapter alone; all, none; without NAME, the names
/exit           end the program (so does Ctrl-D)
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
A message that begins with / is written with //.";

/// Something typed.
#[derive(Debug, PartialEq)]
pub enum Input {
    /// A message for the model.
    Message(String),
    /// A command, or what is wrong with it.
    Command(Result<Command, String>),
}

/// A command, which begins with `/`.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// List the commands.
    Help,
    /// Forget the conversation.
    Reset,
    /// Set the system message.
    System(String),
    /// Write the conversation.
    Save(PathBuf),
    /// Read a conversation.
    Load(PathBuf),
    /// Answer with other adapters, or say which there are.
    Adapter(String),
    /// End the program.
    Exit,
}

/// Reads the next message or command; `None` when there is no more input. Empty lines are passed over. `ask` is called
/// before each line, and told whether it is the first.
pub fn read(lines: &mut dyn BufRead, ask: &mut dyn FnMut(bool)) -> io::Result<Option<Input>> {
    let mut next = |first| -> io::Result<Option<String>> {
        ask(first);
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        for end in ['\n', '\r'] {
            if line.ends_with(end) {
                line.pop();
            }
        }
        Ok(Some(line))
    };
    let mut text = loop {
        match next(true)? {
            None => return Ok(None),
            Some(line) if line.trim().is_empty() => {}
            Some(line) => break line,
        }
    };
    if let Some(block) = text.strip_prefix("\"\"\"") {
        let mut block = block.to_owned();
        while !block.ends_with("\"\"\"") {
            let Some(line) = next(false)? else { break };
            // The line break after the opening mark is no part of the text.
            if !block.is_empty() {
                block.push('\n');
            }
            block += &line;
        }
        let text = block.strip_suffix("\"\"\"").unwrap_or(&block);
        let text = text.strip_suffix('\n').unwrap_or(text);
        return Ok(Some(Input::Message(text.to_owned())));
    }
    while text.ends_with('\\') {
        text.pop();
        let Some(line) = next(false)? else { break };
        text.push('\n');
        text += &line;
    }
    Ok(Some(parse(text)))
}

fn parse(text: String) -> Input {
    let Some(command) = text.strip_prefix('/') else {
        return Input::Message(text);
    };
    if command.starts_with('/') {
        return Input::Message(command.to_owned());
    }
    let (name, rest) = command
        .split_once(char::is_whitespace)
        .unwrap_or((command, ""));
    let rest = rest.trim();
    let file = |make: fn(PathBuf) -> Command| match rest {
        "" => Err(format!("/{name} needs a file")),
        file => Ok(make(file.into())),
    };
    Input::Command(match name {
        "help" | "?" => Ok(Command::Help),
        "reset" => Ok(Command::Reset),
        "system" => Ok(Command::System(rest.to_owned())),
        "save" => file(Command::Save),
        "load" => file(Command::Load),
        "adapter" => Ok(Command::Adapter(rest.to_owned())),
        "exit" | "quit" => Ok(Command::Exit),
        _ => Err(format!("/{name} is no command")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(text: &str) -> Vec<Input> {
        let mut lines = text.as_bytes();
        let next = || read(&mut lines, &mut |_| {}).unwrap();
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn messages_and_commands_are_told_apart() {
        let message = |text: &str| Input::Message(text.into());
        for (text, expected) in [
            ("", vec![]),
            (
                "\n  \nhello\r\nthere",
                vec![message("hello"), message("there")],
            ),
            (
                "one \\\ntwo\\\n three\nfour",
                vec![message("one \ntwo\n three"), message("four")],
            ),
            ("ends\\", vec![message("ends")]),
            (
                "\"\"\"\na\n\n/b\n\"\"\"\nc",
                vec![message("a\n\n/b"), message("c")],
            ),
            ("\"\"\"in one\"\"\"", vec![message("in one")]),
            ("\"\"\"open\nend", vec![message("open\nend")]),
            ("//path is this", vec![message("/path is this")]),
            (
                "/system Be brief. ",
                vec![Input::Command(Ok(Command::System("Be brief.".into())))],
            ),
            (
                "/system",
                vec![Input::Command(Ok(Command::System(String::new())))],
            ),
            (
                "/save a b.json",
                vec![Input::Command(Ok(Command::Save("a b.json".into())))],
            ),
            (
                "/adapter none",
                vec![Input::Command(Ok(Command::Adapter("none".into())))],
            ),
            (
                "/load",
                vec![Input::Command(Err("/load needs a file".into()))],
            ),
            (
                "/nonsense x",
                vec![Input::Command(Err("/nonsense is no command".into()))],
            ),
        ] {
            assert_eq!(inputs(text), expected, "{text:?}");
        }
    }
}
