//! Tables for people, in the manner of `docker ps`.

use comfy_table::{ContentArrangement, Table, presets};

/// Columns under their headers, with nothing drawn around them.
pub(super) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    // The last column is padded, too, which shows when a terminal wraps or somebody copies the text.
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let rows = [["10.5.34.0/24", "udp"], ["10.5.9.0/24", "vxlan"]].map(|row| row.map(String::from));
        let expected = "SUBNET         BACKEND\n10.5.34.0/24   udp\n10.5.9.0/24    vxlan\n";
        assert_eq!(table(["SUBNET", "BACKEND"], rows), expected);
    }
}
