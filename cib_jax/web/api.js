// Requests to the JSON API, and the photos that were uploaded from this tab, which the server does not keep.

const uploaded = new Map(); // code → {name, url}

const urlOf = (path) => new URL(path, document.baseURI).href;
const imageOf = (id) => urlOf(`image/${encodeURIComponent(id)}`);
const thumbnailOf = (id) => urlOf(`thumbnail/${encodeURIComponent(id)}`);

async function fetchJson(path, options) {
  let response;
  try {
    response = await fetch(urlOf(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  throw new Error(answer?.error ?? `The server answered with error ${response.status}.`);
}

// Returns {id or code, k, answer}. For an indexed photo, `query` has its {id, path, width, height}.
async function search({ id, code, k, photo, exclude }, signal) {
  if (photo) {
    const answer = await fetchJson(`search?k=${k}`, { method: "POST", body: photo, signal });
    // If the same photo was uploaded before, its old URL is unused and would keep the file in memory.
    URL.revokeObjectURL(uploaded.get(answer.query.code)?.url ?? "");
    uploaded.set(answer.query.code, { name: photo.name || "Pasted photo", url: URL.createObjectURL(photo) });
    return { id: null, code: answer.query.code, k, answer };
  }
  if (code) {
    const answer = await fetchJson(`search?code=${encodeURIComponent(code)}&k=${k}`, { signal });
    return { id: null, code, k, answer };
  }
  // One more than is displayed, because an indexed photo finds itself. Without an id, the server picks a random photo.
  const parameters = new URLSearchParams(id ? { id, k: k + 1 } : { k: k + 1 });
  const answer = await fetchJson(`search?${parameters}`, { signal });
  const found = answer.query.id;
  if (!id && found === exclude && answer.results.length > 1) return search({ k, exclude }, signal);
  // The photo itself is missing from the results if more than k other photos have the same code.
  const query =
    answer.results.find((result) => result.id === found) ??
    (await fetchJson(`photo?id=${encodeURIComponent(found)}`, { signal }));
  return { id: found, code: null, k, query, answer };
}

