//! Images from Debian's docker-registry: pulled, with a login, broken off, by TLS. Nothing here needs a guest.

mod common;
#[path = "common/pulled.rs"]
mod pulled;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::http::{listen, pass, read_request};
use common::limit::within;
use common::registry::Registry;
use common::skip::skip;
use common::{PATIENCE, run};
use minivmm::image::{How, Source, Store};
use pulled::{Image, SIZE};

#[test]
fn images_are_pulled_by_tag_and_by_digest_and_kept() {
    let Some(registry) = Registry::start("", "") else {
        return;
    };
    let image = Image::new();
    registry.push(&image.path("oci"), "some/image:1.0");
    let name = format!("127.0.0.1:{}/some/image", registry.port);
    image.assert_refused(&name, "has no such image (MANIFEST_UNKNOWN");
    image.assert_pulled(&image.pull(&format!("{name}:1.0")));
    let by_digest = format!("{name}@{}", image.digest);
    image.assert_pulled(&image.pull(&by_digest));
    let other = format!("{name}@sha256:{}", "0".repeat(64));
    image.pull(&other).assert_code(125);
    let listed = run(&mut image.minivmm(&["images"]));
    listed.assert_printed(&[&format!("{name}:1.0, {by_digest}")]);
    // Without its registry it can be run by name, and not be pulled.
    drop(registry);
    let ended = image.pull(&format!("{name}:1.0"));
    ended.assert_code(125);
    ended.assert_said("onnection refused");
    let store = Store::open(&image.path(".cache/minivmm/images")).unwrap();
    let source = Source::Named(format!("{name}:1.0"));
    let stored = source.load(&store, &How::default()).unwrap();
    assert_eq!(stored.meta.digest.to_string(), image.digest);
    let removed = run(&mut image.minivmm(&["rmi", &by_digest]));
    removed.assert_code(0);
    assert!(source.load(&store, &How::default()).is_err());
}

/// ann:secret in Base64.
const AUTH: &str = "YW5uOnNlY3JldA==";

#[test]
fn logins_come_from_dockers_file_and_its_helpers() {
    let auth = "auth: {htpasswd: {realm: here, path: DIR/htpasswd}}\n";
    let Some(registry) = Registry::start(auth, "") else {
        return;
    };
    let image = Image::new();
    registry.push(&image.path("oci"), "a:latest");
    let host = format!("127.0.0.1:{}", registry.port);
    let name = format!("{host}/a");
    image.assert_refused(&name, &format!("docker login {host}"));
    fs::create_dir(image.path(".docker")).unwrap();
    let config = |text: &str| fs::write(image.path(".docker/config.json"), text).unwrap();
    config(&format!(r#"{{"auths":{{"{host}":{{"auth":"eDp5"}}}}}}"#));
    image.assert_refused(&name, "is not logged in");
    config("{");
    image.assert_refused(&name, ".docker/config.json: EOF");
    config(r#"{"credsStore":"none-such"}"#);
    image.assert_refused(&name, "docker-credential-none-such: No such file");
    // A helper, which is a program.
    let helper = image.path("docker-credential-test");
    let script = format!(
        "#!/bin/sh\n[ \"$1 $(cat)\" = 'get {host}' ] && echo '{{\"Username\":\"ann\",\"Secret\":\"secret\"}}'\n"
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let paths = format!("{}:{}", image.path("").display(), env!("PATH"));
    for text in [
        r#"{"credsStore":"test"}"#,
        &format!(r#"{{"credHelpers":{{"{host}":"test"}}}}"#),
    ] {
        config(text);
        let mut pull = image.minivmm(&["pull", &name]);
        image.assert_pulled(&run(pull.env("PATH", &paths)));
        fs::remove_dir_all(image.path(".cache")).unwrap();
    }
    config(&format!(
        r#"{{"auths":{{"http://{host}/v1/":{{"auth":"{AUTH}"}}}}}}"#
    ));
    image.assert_pulled(&image.pull(&name));
}

#[test]
fn a_broken_download_goes_on_where_it_broke_off() {
    let Some(registry) = Registry::start("", "") else {
        return;
    };
    let image = Image::new();
    registry.push(&image.path("oci"), "a:latest");
    // Two connections end in the middle of the large layer.
    let port = registry.port;
    let (cuts, passed) = (AtomicUsize::new(2), Arc::new(AtomicUsize::new(0)));
    let total = Arc::clone(&passed);
    let proxy = listen(move |stream| {
        let cut = |count: usize| count.checked_sub(1);
        // Manifest and configuration fit into it, the layer does not.
        let limit = match cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, cut) {
            Ok(_) => 1 << 20,
            Err(_) => u64::MAX,
        };
        let count = pass(stream, port, limit);
        total.fetch_add(count.try_into().unwrap(), Ordering::SeqCst);
    });
    image.assert_pulled(&image.pull(&format!("127.0.0.1:{proxy}/a")));
    let passed = within(PATIENCE, || {
        let passed = passed.load(Ordering::SeqCst);
        (passed > SIZE).then_some(passed)
    });
    let passed = passed.expect("all of it went through the proxy");
    assert!(passed < SIZE + (1 << 20), "{passed}: nothing is sent twice");
}

#[test]
fn other_hosts_have_to_speak_tls_unless_told_otherwise() {
    let image = Image::new();
    let (key, certificate, unknown) =
        (image.path("key"), image.path("good"), image.path("unknown"));
    let make = |certificate: &Path| {
        let words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=registry.test \
            -addext subjectAltName=DNS:registry.test -addext basicConstraints=critical,CA:FALSE -keyout";
        let mut openssl = Command::new("openssl");
        let openssl = openssl.args(words.split_whitespace()).arg(&key);
        openssl.arg("-out").arg(certificate).output()
    };
    for path in [&unknown, &certificate] {
        let Ok(made) = make(path) else {
            return skip("openssl is not installed");
        };
        assert!(made.status.success(), "{made:?}");
    }
    let tls = format!(
        "  tls: {{certificate: {}, key: {}}}\n",
        certificate.display(),
        key.display()
    );
    let (Some(plain), Some(registry)) = (Registry::start("", ""), Registry::start("", &tls)) else {
        return;
    };
    registry.push(&image.path("oci"), "a");
    plain.push(&image.path("oci"), "a");
    // The way to that host is a proxy, which asks for nothing else.
    let proxy = |port| {
        let proxy = listen(move |mut stream| {
            let request = read_request(&stream).unwrap();
            assert!(request.path.starts_with("registry.test:"), "{request:?}");
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            pass(stream, port, u64::MAX);
        });
        format!("http://127.0.0.1:{proxy}")
    };
    let pull = |options: &[&str], port: u16, trusted: &Path| {
        let mut command = image.minivmm(&[&["pull", "registry.test/a"], options].concat());
        command.env_remove("SSL_CERT_DIR");
        command
            .env("SSL_CERT_FILE", trusted)
            .env("ALL_PROXY", proxy(port));
        run(&mut command)
    };
    for (port, trusted, wanted) in [
        (registry.port, image.path("none"), "no root certificates"),
        (registry.port, unknown, "invalid peer certificate"),
        (plain.port, certificate.clone(), "does not speak TLS"),
    ] {
        let ended = pull(&[], port, &trusted);
        ended.assert_code(125);
        ended.assert_said(wanted);
    }
    image.assert_pulled(&pull(&[], registry.port, &certificate));
    fs::remove_dir_all(image.path(".cache")).unwrap();
    image.assert_pulled(&pull(&["--insecure-registry"], plain.port, &certificate));
}
