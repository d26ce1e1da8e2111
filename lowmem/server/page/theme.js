// Loaded before the page is drawn, so that a remembered theme does not flash: "light", "dark", or the system's.
try {
  const theme = localStorage.getItem("lowmem.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage: the system's theme.
}
