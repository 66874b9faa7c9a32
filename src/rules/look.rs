//! What is there of rules on this host, whoever made them: for looking only.

use super::{
    Error, Family,
    iptables::{self, Iptables},
    tool::Tool,
};

/// What a variant of iptables has of IPv4.
#[derive(Debug)]
pub struct Saved {
    /// For people: `iptables (legacy)`.
    pub variant: &'static str,
    /// What changes it: `iptables`, which is one of the two others, `iptables-nft` or `iptables-legacy`.
    pub program: String,
    /// What `iptables-save` says.
    pub text: Result<String, Error>,
}

/// What there is of the variant that the host uses, and of the other one if it has any rules.
pub async fn iptables_saved() -> Vec<Saved> {
    let Some(used) = Iptables::of_host().await else {
        return Vec::new();
    };
    let mut saved = vec![used.save_all().await];
    if let Some(other) = Iptables::variant(used.other())
        && iptables::may_have_rules(used.other())
    {
        saved.push(other.save_all().await);
    }
    saved
}

/// What `nft -j list ruleset` says, if nftables is installed.
pub async fn nft_ruleset() -> Option<Result<String, Error>> {
    let nft = Tool::find("nft")?;
    Some(nft.run(&["-j", "list", "ruleset"], "").await)
}

impl Iptables {
    async fn save_all(&self) -> Saved {
        Saved {
            variant: self.describe(),
            program: format!("iptables{}", self.infix()),
            text: self.save_tables().await,
        }
    }

    /// All tables of IPv4. The legacy variant is not asked while it has none: that would make them.
    async fn save_tables(&self) -> Result<String, Error> {
        if !iptables::may_have_rules(self.used()) {
            return Ok(String::new());
        }
        iptables::tool(Family::V4, self.infix(), "-save")?.run(&[], "").await
    }
}
