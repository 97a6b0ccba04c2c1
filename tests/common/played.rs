//! A guest's agent that a test plays, where the real one cannot be made to misbehave.

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use super::*;

/// A guest's agent that a test plays: it remembers what it was asked and whether it is frozen.
#[derive(Clone, Default)]
pub struct Played(Arc<Mutex<(Vec<String>, bool)>>);

impl Played {
    /// Plays at a socket, for any number of clients in turn. `answer` gives the reply to a command, or none for silence.
    pub fn start(path: &Path, answer: impl Fn(&str, bool) -> Option<Value> + Send + 'static) -> Played {
        let listener = UnixListener::bind(path).unwrap();
        let me = Played::default();
        let played = me.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                played.serve(BufReader::new(stream), &answer);
            }
        });
        me
    }

    fn serve(&self, mut stream: BufReader<UnixStream>, answer: &impl Fn(&str, bool) -> Option<Value>) {
        let mut line = vec![];
        while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let asked: Value = serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line)).unwrap();
            line.clear();
            let name = asked["execute"].as_str().unwrap();
            let mut state = self.0.lock().unwrap();
            state.0.push(name.to_owned());
            let frozen = state.1;
            let reply = match (name, answer(name, frozen)) {
                ("guest-sync-delimited", _) => {
                    stream.get_mut().write_all(b"\xff").unwrap();
                    Some(json!({"return": asked["arguments"]["id"]}))
                }
                (_, Some(reply)) => Some(reply),
                ("guest-fsfreeze-thaw", None) => {
                    state.1 = false;
                    Some(json!({"return": u8::from(frozen)}))
                }
                ("guest-fsfreeze-freeze", None) => {
                    state.1 = true;
                    Some(json!({"return": 1}))
                }
                ("guest-fsfreeze-status", None) => Some(json!({"return": if frozen { "frozen" } else { "thawed" }})),
                _ => Some(json!({"error": {"class": "CommandNotFound", "desc": "not found"}})),
            };
            drop(state);
            let Some(reply) = reply.filter(|r| *r != json!("silence")) else { continue };
            if stream.get_mut().write_all(format!("{reply}\n").as_bytes()).is_err() {
                return;
            }
        }
    }

    pub fn asked(&self) -> Vec<String> {
        self.0.lock().unwrap().0.clone()
    }

    pub fn is_frozen(&self) -> bool {
        self.0.lock().unwrap().1
    }
}
