// What the miner earns. Its figures come from the miner's own port, through the service.

export function showMiner(page, visible) {
  page.hidden = !visible;
}
