// The threads of one worker. The calling thread is one of them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "waiting.h"

namespace tps {

class Pool {
  public:
    // `crowded`: this machine has fewer cores than threads that compute; waiting threads give way.
    Pool(int threads, bool crowded) : size_(threads), spins_(crowded ? 8 : 1000) {
        for (int thread = 1; thread < threads; ++thread)
            threads_.emplace_back([this, thread] { work(thread); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    int size() const { return size_; }
    int spins() const { return spins_; }

    // Runs job(thread) on all threads at once; returns when all have finished.
    void run(const std::function<void(int)>& job) {
        if (size_ == 1) return job(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job(0);
        barrier();
    }

    // Within a job: returns when all threads have come here.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; }, spins_);
    }

  private:
    void work(int thread) {
        uint32_t done = 0;
        for (;;) {
            const auto called = [&] { return round_.load(std::memory_order_acquire) != done; };
            for (int i = 0; i < spins_ && !called(); ++i) pause_briefly();
            const std::function<void(int)>* job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || called(); });
                if (stopping_) return;
                done = round_.load(std::memory_order_relaxed);
                job = job_;
            }
            (*job)(thread);
            barrier();
        }
    }

    const int size_, spins_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<uint32_t> round_{0}, phase_{0};
    std::atomic<int> arrived_{0};
};

}  // namespace tps
