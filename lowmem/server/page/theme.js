// Runs before the page is drawn, so that the saved theme ("light", "dark" or the system's) does not flash.
try {
  const theme = localStorage.getItem("lowmem.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage, the system's theme is used.
}
