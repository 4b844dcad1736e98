//! `kill -9` at every step of the control plane, on the fake driver: its sandboxes live on, what
//! was acknowledged is kept, and nothing runs that the store does not know.

#[path = "support/deaths.rs"]
mod deaths;
#[path = "support/rows.rs"]
mod rows;
#[path = "support/server.rs"]
mod server;

use std::path::PathBuf;

use belljar_daemon::fault::Point;
use serde_json::{Value, json};

use deaths::{
    Death, Made, Op, Role, acknowledged, agreed, ask, assert_lives, deaths, id_of, make,
    one_process_dies,
};
use server::{Server, fake_template, left_in, up};

/// A live node, and the folder of the control planes that come and go over it.
struct Stage {
    node: Server,
    node_data: tempfile::TempDir,
    data: tempfile::TempDir,
    socket: PathBuf,
}

impl Stage {
    fn new() -> Stage {
        let node_data = tempfile::tempdir().expect("a temporary folder");
        fake_template(node_data.path());
        let node = Server::start_node(node_data.path(), "fake");
        let socket = PathBuf::from(node.text("socket"));
        Stage { node, node_data, data: tempfile::tempdir().expect("a temporary folder"), socket }
    }

    fn control(&self) -> Server {
        Server::start_control(self.data.path(), &self.socket)
    }

    /// `None` when it has died already: a start may find something to write.
    fn armed(&self, fault: &str) -> Option<Server> {
        Server::try_run(
            up(self.data.path()).arg("--node").arg(&self.socket).env("BELLJAR_FAULT", fault),
        )
    }

    /// What is true after control died and came back, whatever it was doing.
    fn check(&self, first: &Made, answer: &Option<(u16, Value)>, death: Death) {
        let control = self.control();
        let ids = agreed(&control, self.data.path(), &self.socket, death);
        let told = acknowledged(answer);
        match death.op {
            Op::Kill => {
                let known = ids.contains(&first.id);
                assert!(!(told && known), "{death:?}: a killed sandbox is back");
                if known {
                    assert_lives(&control, first, death);
                }
            }
            Op::Create => {
                assert_lives(&control, first, death);
                if let Some((201, sandbox)) = answer {
                    let id = id_of(sandbox);
                    let token = sandbox["envdAccessToken"].as_str().expect("a token").to_owned();
                    let (_, detail) = control.api("GET", &format!("/sandboxes/{id}"), None);
                    let expected = json!({ "made": "while dying" });
                    assert_eq!(detail["metadata"], expected, "{death:?}: {id} is lost: {detail}");
                    assert_lives(&control, &Made { id, token, detail }, death);
                }
            }
            Op::Connect | Op::Timeout | Op::Expire => {
                assert_lives(&control, first, death);
                let (_, now) = control.api("GET", &format!("/sandboxes/{}", first.id), None);
                let moved = now["endAt"] != first.detail["endAt"];
                assert!(moved || !told, "{death:?}: an acknowledged end is forgotten");
            }
        }
        for id in &ids {
            let (status, _) = control.api("DELETE", &format!("/sandboxes/{id}"), None);
            assert_eq!(status, 204, "{death:?}: {id}");
        }
        assert_eq!(agreed(&control, self.data.path(), &self.socket, death), Vec::<String>::new());
        control.stop();
    }

    fn close(self) {
        let tag = self.node.text("host_tag").to_owned();
        self.node.stop();
        assert_eq!(left_in(self.node_data.path(), &tag), Vec::<String>::new());
    }
}

#[test]
fn control_dies_at_every_step_and_its_sandboxes_do_not() {
    let stage = Stage::new();
    for death in deaths(Role::Control) {
        let control = stage.control();
        let first = make(&control, stage.data.path(), 1000);
        control.stop();
        let armed = stage.armed(death.point.name());
        let answer = armed.and_then(|armed| {
            let answer = ask(&armed, death.op, &first.id);
            armed.dies(&death.text());
            answer
        });
        stage.check(&first, &answer, death);
    }
    stage.close();
}

#[test]
fn what_was_answered_is_kept_when_the_store_never_heard_of_it() {
    let stage = Stage::new();
    for op in [Op::Create, Op::Connect, Op::Timeout, Op::Kill] {
        let control = stage.control();
        let first = make(&control, stage.data.path(), 1000);
        control.stop();
        let death = Death { point: Point::StoreBeforeWrite, op, nth: 1 };
        let armed = stage.armed("control.store.before-write:hold").expect("held, not dead");
        let answer = ask(&armed, op, &first.id);
        assert!(acknowledged(&answer), "{op:?} waits for the store: {answer:?}");
        armed.crash();
        stage.check(&first, &answer, death);
    }
    stage.close();
}

#[test]
fn a_whole_server_dies_at_every_step_of_control() {
    one_process_dies(Role::Control);
}
