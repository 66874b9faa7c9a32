//! What is there of rules on this host, whoever made them: for looking only.

use super::{
    Error, Family,
    iptables::{self, Iptables},
    tool::Tool,
};

/// What `iptables-save` says of IPv4, for the variant that the host uses and for the other one if it has any rules: a name for
/// people, and the text.
pub async fn iptables_saved() -> Vec<(&'static str, Result<String, Error>)> {
    let Some(used) = Iptables::of_host().await else {
        return Vec::new();
    };
    let mut saved = vec![(used.describe(), used.save_all().await)];
    if let Some(other) = Iptables::variant(used.other())
        && iptables::may_have_rules(used.other())
    {
        saved.push((other.describe(), other.save_all().await));
    }
    saved
}

/// What `nft -j list ruleset` says, if nftables is installed.
pub async fn nft_ruleset() -> Option<Result<String, Error>> {
    let nft = Tool::find("nft")?;
    Some(nft.run(&["-j", "list", "ruleset"], "").await)
}

impl Iptables {
    /// All tables of IPv4. The legacy variant is not asked while it has none: that would make them.
    async fn save_all(&self) -> Result<String, Error> {
        if !iptables::may_have_rules(self.used()) {
            return Ok(String::new());
        }
        iptables::tool(Family::V4, self.infix(), "-save")?.run(&[], "").await
    }
}
