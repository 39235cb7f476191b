#include "host/ngram_trie.h"

#include <algorithm>
#include <utility>

namespace stretto {

using Lock = std::lock_guard<std::mutex>;

NgramTrie::NgramTrie(NgramConfig config) : config_(std::move(config)), outputs_(std::make_unique<CountTrie>(span(), config_.max_tree_nodes)) {}

bool NgramTrie::is_stop(int32_t token) const {
  return std::find(config_.stop_tokens.begin(), config_.stop_tokens.end(), token) != config_.stop_tokens.end();
}

bool NgramTrie::is_eos(int32_t token) const { return std::find(config_.eos.begin(), config_.eos.end(), token) != config_.eos.end(); }

// Outputs give way to prompts. An eighth of the room is freed at once: eviction closes the branches that are growing.
void NgramTrie::make_room() {
  const int64_t room = config_.max_bytes - prompt_bytes_;
  if (outputs_->bytes() > room) outputs_->evict(room - room / 8);
}

void NgramTrie::append_output(CountTrie::Text& text, const int32_t* tokens, int64_t n, bool* ended) {
  for (int64_t i = 0; i < n && !*ended; ++i) {
    if (is_eos(tokens[i])) {
      *ended = true;
      return;
    }
    outputs_->append(text, tokens[i], !is_stop(tokens[i]));
    make_room();
  }
}

void NgramTrie::insert_input(int64_t request, const int32_t* tokens, int64_t n) {
  if (n < 2) return;
  const Lock lock(mutex_);
  Request& state = requests_[request];
  const int64_t used = prompt_bytes_, room = (config_.max_bytes - used) / 8 - 1;  // tokens: 4 bytes each and 4 for its place
  const int64_t kept = std::min(n - 1, room);                                     // the end of a prompt that is too long
  if (kept < 1) return;
  if (!state.prompt) state.prompt = std::make_unique<SuffixIndex>(span());
  prompt_bytes_ -= state.prompt->bytes();
  state.prompt->add(tokens + n - kept, kept);
  prompt_bytes_ += state.prompt->bytes();
  make_room();
}

void NgramTrie::extend_output(int64_t request, const int32_t* tokens, int64_t n) {
  const Lock lock(mutex_);
  Request& state = requests_[request];
  append_output(state.output, tokens, n, &state.ended);
}

void NgramTrie::insert_output(const int32_t* tokens, int64_t n) {
  const Lock lock(mutex_);
  CountTrie::Text text;
  bool ended = false;
  append_output(text, tokens, n, &ended);
  outputs_->squeeze();
}

void NgramTrie::release(int64_t request) {
  const Lock lock(mutex_);
  const auto it = requests_.find(request);
  if (it == requests_.end()) return;
  if (it->second.prompt) prompt_bytes_ -= it->second.prompt->bytes();
  requests_.erase(it);
  outputs_->squeeze();
}

NgramDraft NgramTrie::query(const int32_t* suffix, int64_t n, int budget, int max_depth, NgramMode mode, NgramShape shape, int64_t request) {
  const Lock lock(mutex_);
  ++queries_;
  const auto it = requests_.find(request);
  const SuffixIndex* prompt = it == requests_.end() || mode == NgramMode::output ? nullptr : it->second.prompt.get();
  const int32_t last = suffix[n - 1];
  NgramDraft best{{last}, {-1}};
  for (int64_t length = std::min<int64_t>(n, config_.max_query_length); length > 0; --length) {
    const int32_t* key = suffix + n - length;
    if (length == 1 && is_stop(last)) break;
    NgramPlace place{outputs_.get(), mode == NgramMode::input ? CountTrie::kNone : outputs_->find_root(key[0]), prompt, {}, static_cast<int>(length)};
    if (prompt) place.input = prompt->narrow(prompt->all(), 0, key[0]);
    for (int64_t i = 1; i < length; ++i) {
      if (place.output != CountTrie::kNone) place.output = outputs_->find_child(place.output, key[i]);
      if (prompt) place.input = prompt->narrow(place.input, static_cast<int>(i), key[i]);
    }
    if (place.output == CountTrie::kNone && place.input.size() == 0) continue;
    if (place.output != CountTrie::kNone) outputs_->touch(key[0]);
    NgramDraft draft = build_draft(place, last, budget, std::min(max_depth, config_.branch_length), mode, shape);
    if (draft.tokens.size() > best.tokens.size()) best = std::move(draft);
    if (static_cast<int>(best.tokens.size()) >= config_.branch_length) break;
  }
  hits_ += best.tokens.size() > 1;
  drafted_ += static_cast<int64_t>(best.tokens.size()) - 1;
  return best;
}

std::pair<int64_t, int64_t> NgramTrie::count(const int32_t* tokens, int64_t n, int64_t request) const {
  const Lock lock(mutex_);
  std::pair<int64_t, int64_t> found{0, 0};
  if (n - 1 > span()) return found;
  CountTrie::NodeId node = outputs_->find_root(tokens[0]);
  for (int64_t i = 1; i < n && node != CountTrie::kNone; ++i) node = outputs_->find_child(node, tokens[i]);
  if (node != CountTrie::kNone) found.second = outputs_->count(node);
  const auto it = requests_.find(request);
  if (it != requests_.end() && it->second.prompt) {
    const SuffixIndex& prompt = *it->second.prompt;
    SuffixIndex::Range range = prompt.all();
    for (int64_t i = 0; i < n; ++i) range = prompt.narrow(range, static_cast<int>(i), tokens[i]);
    found.first = range.size();
  }
  return found;
}

NgramStats NgramTrie::stats() const {
  const Lock lock(mutex_);
  return {.nodes = outputs_->nodes(),
          .trees = outputs_->trees(),
          .bytes = outputs_->bytes() + prompt_bytes_,
          .requests = static_cast<int64_t>(requests_.size()),
          .evicted_trees = outputs_->evicted_trees(),
          .squeezed_trees = outputs_->squeezed_trees(),
          .queries = queries_,
          .hits = hits_,
          .drafted = drafted_};
}

std::vector<int32_t> NgramTrie::dump() const {
  const Lock lock(mutex_);
  return outputs_->dump();
}

std::string NgramTrie::restore(const int32_t* words, int64_t size) {
  auto fresh = std::make_unique<CountTrie>(span(), config_.max_tree_nodes);
  std::string problem = fresh->restore(words, size, config_.vocab_size);
  if (!problem.empty()) return problem;
  const Lock lock(mutex_);
  for (auto& [request, state] : requests_) state.output = {};
  outputs_ = std::move(fresh);
  make_room();
  return "";
}

}  // namespace stretto
