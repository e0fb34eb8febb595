//! Started by the init of the nested-KVM test host; see `drago_tests::testbed`.

fn main() -> anyhow::Result<()> {
    let token = std::env::var("TOKEN").unwrap_or_default();
    drago_tests::testbed::agent::serve(&token)
}
